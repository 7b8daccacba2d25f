"""What a request's sampling fields come to as arrays: made once for a request, and shared by all its samples.

Imports no torch. Knows nothing of logits, or of the tokens of any sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from model.sampling_params import BAN, SamplingParams

WORD_BITS = 32

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Breakers:
    """DRY's breakers by their first token: head t begins those of tails[head_starts[t] : head_starts[t + 1]].

    Tail i, the tokens that have to follow the head, is tail_tokens[tail_starts[i] : tail_starts[i + 1]]; it may be
    empty.
    """

    head_starts: Ids  # (vocab + 1,)
    tails: Ids  # (pairs of a head and a tail,)
    tail_starts: Ids  # (tails + 1,)
    tail_tokens: Ids

    def tokens_since(self, window: Sequence[int]) -> int:
        """How many tokens follow the last breaker in a text; all of them where there is none."""
        text: Ids = np.asarray(window, dtype=np.int32)
        counts = self.head_starts[text + 1] - self.head_starts[text]
        heads: list[int] = np.flatnonzero(counts).tolist()
        for at in reversed(heads):
            start = int(self.head_starts[text[at]])
            after = len(text) - at - 1  # tokens that follow the head
            tails = self.tails[start : start + int(counts[at])].tolist()
            ends = [each for i in tails if (each := self._length(i, text, at + 1)) is not None]
            if ends:
                return after - max(ends)
        return len(text)

    def _length(self, tail: int, text: Ids, at: int) -> int | None:
        """Of a tail, if the text has it there."""
        tokens = self.tail_tokens[self.tail_starts[tail] : self.tail_starts[tail + 1]]
        return int(tokens.size) if np.array_equal(text[at : at + len(tokens)], tokens) else None


@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True, eq=False)
class RequestTables:
    """Of one request. Ids are int32 and rise; a field is None where the request does not ask for it."""

    params: SamplingParams
    vocab_size: int
    bias_ids: Ids | None
    bias_values: npt.NDArray[np.float32] | None  # of bias_ids; minus infinity bans the token
    allowed: npt.NDArray[np.uint32] | None  # bit i of word w: token 32 w + i may come
    ends: Ids | None  # what min_tokens bans: EOS and stop_token_ids
    bad_ids: Ids | None  # bad words of one token
    bad_runs: dict[int, list[tuple[int, ...]]]  # the longer bad words, by their last token but one
    breakers: Breakers | None  # of DRY

    def allowed_bits(self) -> npt.NDArray[np.bool_] | None:
        """(vocab,): `allowed`, a byte each."""
        return None if self.allowed is None else unpack(self.allowed, self.vocab_size)


def unpack(words: npt.NDArray[np.uint32], vocab_size: int) -> npt.NDArray[np.bool_]:
    """Bit i of word w says what item 32 w + i is of what is returned, (vocab_size,)."""
    packed = words.astype("<u4", copy=False).view(np.uint8)
    return np.unpackbits(packed, count=vocab_size, bitorder="little").view(np.bool_)


def make_tables(params: SamplingParams, vocab_size: int, eos_token_ids: Iterable[int]) -> RequestTables:
    bias = params.logit_bias
    singles = {word[0] for word in params.bad_words if len(word) == 1}
    runs: dict[int, list[tuple[int, ...]]] = {}
    for word in params.bad_words:
        if len(word) > 1:
            runs.setdefault(word[-2], []).append(word)
    return RequestTables(
        params=params,
        vocab_size=vocab_size,
        bias_ids=_ids(id_ for id_, _ in bias) if bias else None,
        bias_values=_biases(value for _, value in bias) if bias else None,
        allowed=None if params.allowed_token_ids is None else _pack(params.allowed_token_ids, vocab_size),
        ends=_ids(sorted({*eos_token_ids, *params.stop_token_ids})) if params.min_tokens else None,
        bad_ids=_ids(sorted(singles)) if singles else None,
        bad_runs=runs,
        breakers=None if params.dry is None else make_breakers(params.dry.breakers, vocab_size),
    )


def make_breakers(breakers: Iterable[tuple[tuple[int, ...], tuple[int, ...]]], vocab_size: int) -> Breakers:
    """breakers: each the tokens that may begin one, and those that have to follow."""
    pairs = list(breakers)
    heads = [_ids(each) for each, _ in pairs]
    head = np.concatenate([*heads, _ids(())])
    tail = np.repeat(np.arange(len(pairs), dtype=np.int32), [len(each) for each in heads])
    order = np.argsort(head, kind="stable")
    return Breakers(
        head_starts=np.searchsorted(head[order], np.arange(vocab_size + 1)).astype(np.int32),
        tails=tail[order],
        tail_starts=_ids(accumulate((len(each) for _, each in pairs), initial=0)),
        tail_tokens=_ids(token for _, each in pairs for token in each),
    )


def _pack(ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.uint32]:
    bits = np.zeros(-(-vocab_size // WORD_BITS) * WORD_BITS, dtype=np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _biases(biases: Iterable[float]) -> npt.NDArray[np.float32]:
    return np.array([-np.inf if bias <= BAN else bias for bias in biases], dtype=np.float32)


def _ids(ids: Iterable[int]) -> Ids:
    return np.array(list(ids), dtype=np.int32)


class TablesOfRequests:
    """Those of requests that run. The samples of a request have the same SamplingParams, the very object."""

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        # By the identity of their params, which the tables keep alive. They go with the last sample that holds them.
        self._made: WeakValueDictionary[int, RequestTables] = WeakValueDictionary()

    def of(self, params: SamplingParams) -> RequestTables:
        tables = self._made.get(id(params))
        if tables is None:
            tables = self._made[id(params)] = make_tables(params, self._vocab_size, self._eos_token_ids)
        return tables
