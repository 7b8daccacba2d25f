"""Grammars that an output must match: which tokens may come next. Run by llguidance over a checkpoint's own vocabulary.

A matcher is a function of its grammar and the tokens it was given, so it can be had again from a sequence's output.
Imports no torch. Knows nothing of where a grammar came from, or of how one of the allowed tokens is chosen.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from model.errors import GrammarError, ModelError
from model.step import GrammarState
from model.tokenizer import Tokenizer

# Work that compiling a grammar, or one step of it, may take: tens of ms, beyond which it is refused or given up.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=500_000,
    step_max_items=4_000,
    max_lexer_states=30_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
COMPILED_MAX = 32
MASK_THREADS = 2
SLOW = 1e-4  # seconds: a mask that takes less is computed where it is asked for
NOTHING = b""


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
    """Where one output is in its grammar. Used by one thread; masks that take long are computed in another."""

    __slots__ = ("_ends", "_mask", "_masks", "_matcher", "_seconds", "state", "vocab_size")

    state: GrammarState  # LOST where that was found out so far: `allowed` may yet find it

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], vocab_size: int) -> None:
        """ends: the EOS tokens, allowed where the grammar is matched."""
        self.vocab_size = vocab_size
        self.state = GrammarState.OPEN
        self._matcher = matcher
        self._ends = ends
        self._masks: Executor | None = None
        self._mask: bytes | Future[bytes] | None = None  # None: not asked for yet
        self._seconds = 0.0  # that the last one took
        self._settle()

    def advance(self, tokens: Sequence[int]) -> None:
        self._wait()
        if self.state is GrammarState.LOST:
            return
        if not self._ends.isdisjoint(tokens):
            self.state, self._mask = GrammarState.COMPLETE, NOTHING
        elif self._matcher.consume_tokens(list(tokens)):
            self._mask = None
            self._settle()
        else:
            self.state = GrammarState.LOST

    @property
    def allowed(self) -> bytes | None:
        """A bit for each token, least significant first. None once an end has come, and where nothing can follow.

        Waits for a mask that is under way.
        """
        self._wait()
        if self._mask is None:
            self._mask = self._compute()
        assert isinstance(self._mask, bytes)
        if self.state is not GrammarState.LOST and self._mask is not NOTHING:
            self._judge(self._mask)
        return None if self.state is GrammarState.LOST or self._mask is NOTHING else self._mask

    def copy(self) -> Matcher:
        self._wait()
        matcher = Matcher.__new__(Matcher)
        matcher.vocab_size, matcher.state = self.vocab_size, self.state
        matcher._matcher, matcher._ends = self._matcher.deep_copy(), self._ends
        matcher._masks, matcher._mask, matcher._seconds = self._masks, self._mask, self._seconds
        return matcher

    def using(self, masks: Executor) -> Matcher:
        """masks: computes what takes long, beside whatever its caller does until it asks for it."""
        self._masks = masks
        return self

    def _settle(self) -> None:
        """What is known at once; of the mask no more than that it will be wanted."""
        if self._matcher.is_stopped():
            accepting = self._matcher.is_accepting() and not self._matcher.is_error()
            self.state = GrammarState.COMPLETE if accepting else GrammarState.LOST
        elif self._masks is not None and self._seconds > SLOW:
            self._mask = self._masks.submit(self._compute)

    def _compute(self) -> bytes:
        began = time.perf_counter()
        mask = self._matcher.compute_bitmask()
        self._seconds = time.perf_counter() - began
        return mask

    def _wait(self) -> None:
        if isinstance(self._mask, Future):
            self._mask = self._mask.result()

    def _judge(self, mask: bytes) -> None:
        bits = 0 if self._matcher.is_error() else int.from_bytes(mask, "little")
        if not bits:
            self.state = GrammarState.LOST
        elif not bits & ~sum(1 << end for end in self._ends):
            self.state = GrammarState.COMPLETE if self._matcher.is_accepting() else GrammarState.LOST


class _Lost(Matcher):
    """Of a grammar that cannot be compiled here after all."""

    __slots__ = ()

    def __init__(self) -> None:
        self.state, self._mask, self._masks = GrammarState.LOST, NOTHING, None


class Vocabulary:
    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes some 200 ms: the vocabulary as a tree of bytes.

        Raises GrammarError where no grammar can be followed: text is more than the bytes of its tokens, or nothing
        ends it.
        """
        if not tokenizer.byte_level or not tokenizer.eos_token_ids:
            raise GrammarError("grammars need a vocabulary of bytes, with a token that ends a text")
        self._ends = frozenset(tokenizer.eos_token_ids)
        words = _Words(tokenizer)
        self._tokenizer = LLTokenizer(words, eos_token=list(tokenizer.eos_token_ids))
        # The first token of each single byte. Of the other words llguidance has its own copy by now.
        self._bytes = {
            words.tokens[id_]: id_ for id_ in reversed(range(tokenizer.vocab_size)) if len(words.tokens[id_]) == 1
        }
        words.tokens = []

    def tokens_of(self, raw: bytes) -> list[int]:
        """The token of each byte by itself."""
        return [self._bytes[bytes([byte])] for byte in raw]

    def compile(self, grammar: str) -> Matcher:
        """grammar: what one of LLMatcher.grammar_from_* returns. Raises GrammarError."""
        compiled = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if compiled.is_error():
            raise GrammarError(compiled.get_error())
        matcher = Matcher(compiled, self._ends, self._tokenizer.vocab_size)
        if matcher.allowed is None:
            raise GrammarError("nothing matches it, or finding out takes too long")
        return matcher


class Grammars:
    """A worker's grammars, the latest of them compiled."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        """load: called by `begin`, or else for the first grammar. Raises GrammarError."""
        self._load = load
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()
        self._making = Lock()
        self._compiler = ThreadPoolExecutor(1, "compiler")  # their threads start with the first work for them
        self._masks = ThreadPoolExecutor(MASK_THREADS, "masks")

    def begin(self) -> Future[None]:
        """Make the vocabulary in a thread: for some 0.1 s no other runs Python, which is no time for a step."""
        return self._compiler.submit(self._begin)

    def prepare(self, grammar: str) -> Future[None] | None:
        """Compile it in a thread, so that no step has to. None where that is done."""
        return None if grammar in self._compiled else self._compiler.submit(self._prepare, grammar)

    def matcher(self, grammar: str, output: Sequence[int]) -> Matcher:
        """At the place where `output` has led; lost, if the grammar cannot be compiled here after all."""
        try:
            matcher = self._latest(grammar).copy().using(self._masks)
        except ModelError:
            return _Lost()
        if output:
            matcher.advance(output)
        return matcher

    def _begin(self) -> None:
        with suppress(ModelError), self._making:  # of a vocabulary that is not there, or cannot write every text
            self._vocabulary = self._vocabulary or self._load()

    def _prepare(self, grammar: str) -> None:
        with suppress(ModelError):  # whoever asks for it is told
            self._latest(grammar)

    def _latest(self, grammar: str) -> Matcher:
        with self._making:
            if grammar not in self._compiled:
                self._vocabulary = self._vocabulary or self._load()
                self._compiled[grammar] = self._vocabulary.compile(grammar)
                if len(self._compiled) > COMPILED_MAX:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]
