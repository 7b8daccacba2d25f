"""Grammars that an output must match: which tokens may come next. Run by llguidance over a checkpoint's own vocabulary.

A matcher is a function of its grammar and the tokens it was given, so it can be had again from a sequence's output.
Imports no torch. Knows nothing of where a grammar came from, or of how one of the allowed tokens is chosen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from model.errors import GrammarError
from model.step import GrammarState
from model.tokenizer import Tokenizer

# Work that compiling a grammar, or one step of it, may take: tens of ms, beyond which it is refused or given up.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=500_000,
    step_max_items=50_000,
    max_lexer_states=30_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
COMPILED_MAX = 32


class _Words(TokenizerWrapper):
    """The vocabulary in the shape llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """In place of the wrapper's own, which begins by encoding a text: some tokenizers get large by that."""
        self.is_tokenizer_wrapper = True
        self.bos_token_id = None
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
        self._encode = tokenizer.encode_plain  # what a grammar says is text, the names of special tokens too

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class Matcher:
    """Where one output is in its grammar. `allowed` has a bit for each token, least significant first, or is None."""

    __slots__ = ("_ends", "_matcher", "allowed", "state", "vocab_size")

    allowed: bytes | None
    state: GrammarState

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], vocab_size: int) -> None:
        """ends: the EOS tokens, allowed where the grammar is matched."""
        self.vocab_size = vocab_size
        self._matcher = matcher
        self._ends = ends
        self._look()

    def advance(self, tokens: Sequence[int]) -> None:
        if self.state is GrammarState.LOST:
            return
        if not self._ends.isdisjoint(tokens):
            self.allowed, self.state = None, GrammarState.COMPLETE
        elif self._matcher.consume_tokens(list(tokens)):
            self._look()
        else:
            self.allowed, self.state = None, GrammarState.LOST

    def copy(self) -> Matcher:
        matcher = Matcher.__new__(Matcher)
        matcher.vocab_size, matcher._ends = self.vocab_size, self._ends
        matcher._matcher = self._matcher.deep_copy()
        matcher.allowed, matcher.state = self.allowed, self.state
        return matcher

    @classmethod
    def lost(cls) -> Matcher:
        matcher = cls.__new__(cls)
        matcher.allowed, matcher.state = None, GrammarState.LOST
        return matcher

    def _look(self) -> None:
        mask = self._matcher.compute_bitmask()
        bits = 0 if self._matcher.is_error() else int.from_bytes(mask, "little")
        self.allowed = mask
        if not bits:
            self.state = GrammarState.LOST
        elif bits & ~sum(1 << end for end in self._ends):
            self.state = GrammarState.OPEN
        else:
            self.state = GrammarState.COMPLETE if self._matcher.is_accepting() else GrammarState.LOST


class Vocabulary:
    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes some 200 ms: the vocabulary as a tree of bytes.

        Raises GrammarError where no grammar can be followed: text is more than the bytes of its tokens, or nothing
        ends it.
        """
        if not tokenizer.byte_level or not tokenizer.eos_token_ids:
            raise GrammarError("grammars need a vocabulary of bytes, with a token that ends a text")
        self._ends = frozenset(tokenizer.eos_token_ids)
        self._tokenizer = LLTokenizer(_Words(tokenizer), eos_token=list(tokenizer.eos_token_ids))
        self._bytes = {tokenizer.token_bytes(id_): id_ for id_ in reversed(range(tokenizer.vocab_size))}

    def tokens_of(self, raw: bytes) -> list[int]:
        """The token of each byte by itself."""
        return [self._bytes[bytes([byte])] for byte in raw]

    def compile(self, grammar: str) -> Matcher:
        """grammar: what one of LLMatcher.grammar_from_* returns. Raises GrammarError."""
        compiled = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if compiled.is_error():
            raise GrammarError(compiled.get_error())
        matcher = Matcher(compiled, self._ends, self._tokenizer.vocab_size)
        if matcher.state is GrammarState.LOST:
            raise GrammarError("nothing matches it, or finding out takes too long")
        return matcher


class Grammars:
    """A worker's grammars, the latest of them compiled. Most workers never see one, so nothing is made beforehand."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        """load: called for the first grammar."""
        self._load = load
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()

    def matcher(self, grammar: str, output: Sequence[int]) -> Matcher:
        """At the place where `output` has led; lost, if the grammar cannot be compiled here after all."""
        try:
            matcher = self._latest(grammar).copy()
        except GrammarError:
            return Matcher.lost()
        if output:
            matcher.advance(output)
        return matcher

    def _latest(self, grammar: str) -> Matcher:
        if grammar not in self._compiled:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            self._compiled[grammar] = self._vocabulary.compile(grammar)
            if len(self._compiled) > COMPILED_MAX:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar]
