"""Texts that the sampler needs as token sequences: bad words and the breakers of DRY.

It knows the vocabulary; limits and types were checked when the request was parsed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import anyio.to_thread

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.api.schemas import CompletionBody

BORDER = "\u0100"  # between tokens written one character a byte
REMEMBERED_MAX = 64

Run = tuple[int, ...]  # of token ids
Breaker = tuple[Run, Run]  # any one of some tokens, and then all of these


class Phrases:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._index: tuple[str, list[int]] | None = None
        self._breakers: OrderedDict[str, tuple[Breaker, ...]] = OrderedDict()

    async def resolve(self, params: SamplingParams, body: CompletionBody) -> SamplingParams:
        """In a thread, where there is anything to do: scanning the vocabulary takes milliseconds."""
        if not body.bad_words and params.dry is None:
            return params
        return await anyio.to_thread.run_sync(self._resolve, params, body)

    def _resolve(self, params: SamplingParams, body: CompletionBody) -> SamplingParams:
        params = replace(
            params, bad_words=tuple(tuple(run) for word in body.bad_words for run in self._tokenizer.runs(word))
        )
        if params.dry is None:
            return params
        breakers = {each for text in body.dry_sequence_breakers for each in self.breaker(text)}
        return replace(params, dry=replace(params.dry, breakers=tuple(sorted(breakers))))

    def breaker(self, text: str) -> tuple[Breaker, ...]:
        """As llama.cpp: every token that holds the text, and every token that begins it with what has to follow; the
        latter where any text can be written."""
        known = self._breakers.get(text)
        if known is None:
            raw = text.encode()
            found: list[Breaker] = [(tuple(self._tokens_with(raw)), ())]
            for cut in range(1, len(raw) if self._tokenizer.byte_level else 0):
                heads = tuple(self._tokens_with(raw[:cut], at_end=True))
                if heads:
                    found.append((heads, tuple(self._tail(raw[cut:]))))
            known = self._breakers[text] = tuple(found)
            if len(self._breakers) > REMEMBERED_MAX:
                self._breakers.popitem(last=False)
        return known

    def _tail(self, raw: bytes) -> Sequence[int]:
        try:
            return self._tokenizer.encode(raw.decode())
        except UnicodeDecodeError:  # it begins inside a character: byte by byte
            return [next(iter(self._tokens_with(bytes([byte]), whole=True))) for byte in raw]

    def _tokens_with(self, raw: bytes, *, at_end: bool = False, whole: bool = False) -> Iterator[int]:
        if self._index is None:
            words = [self._tokenizer.token_bytes(id_).decode("latin-1") for id_ in range(self._tokenizer.vocab_size)]
            starts = [0, *accumulate(len(word) + 1 for word in words)]
            self._index = BORDER + BORDER.join(words) + BORDER, starts
        written, starts = self._index
        wanted = BORDER * whole + raw.decode("latin-1") + BORDER * (at_end or whole)
        at = written.find(wanted)
        while at >= 0:
            id_ = bisect_right(starts, max(at - 1 + whole, 0)) - 1
            yield id_
            at = written.find(wanted, starts[id_ + 1])
