"""A choice's deltas to the JSON of the wire, whole or in chunks. Both are made of the same pieces.

Hot path: a chunk is one small dict between two constant strings. No models here, and no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from model.step import TokenLogprobs
from server.engine.output import LOGPROB_FLOOR, TokenTexts
from server.engine.request import ChoiceDelta, Prompt, TokenInfo, Usage

CHUNK_BYTES = 64 << 10  # old clients drop the stream at a line of 128 KB

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What is equal in every chunk of an answer."""

    id: str
    created: int  # unix seconds
    model: str
    fingerprint: str

    def wrap(self, choices: str, usage: str = "") -> bytes:
        """choices, usage: JSON already; an empty usage leaves the key out."""
        head = f'"id":{_encode(self.id)},"object":"text_completion","created":{self.created}'
        tail = f'"system_fingerprint":{_encode(self.fingerprint)}' + (f',"usage":{usage}' if usage else "")
        return f'{{{head},"model":{_encode(self.model)},"choices":[{choices}],{tail}}}'.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceOptions:
    """What the client wants to see of a choice."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False


def usage_json(usage: Usage) -> str:
    return _encode({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })  # fmt: skip


def logprobs_object(rows: Sequence[TokenInfo], count: int) -> dict[str, Any]:
    """count: the logprobs parameter. With 0 there are no alternatives, and top_logprobs is null."""
    return {
        "tokens": [row.token for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": [row.top for row in rows] if count else None,
        "text_offset": [row.text_offset for row in rows],
    }


def prompt_logprobs_object(
    prompt: Prompt, rows: Sequence[TokenLogprobs], count: int, texts: TokenTexts
) -> list[dict[str, Any] | None]:
    """vLLM's shape: per prompt token, its own score and those of the `count` likeliest, by token id."""
    answer: list[dict[str, Any] | None] = [None]
    for token, row in zip(prompt.token_ids[1:], rows, strict=True):
        scores: dict[str, Any] = {
            str(id_): _scored(logprob, rank, texts[id_]) for rank, (id_, logprob) in enumerate(row.top[:count], 1)
        }
        if str(token) not in scores:
            scores[str(token)] = _scored(row.logprob, row.rank, texts[token])
        answer.append(scores)
    return answer


def _scored(logprob: float, rank: int | None, text: str) -> dict[str, Any]:
    return {"logprob": max(logprob, LOGPROB_FLOOR), "rank": rank, "decoded_token": text}


class ChoiceCollector:
    """The deltas of one choice, joined."""

    def __init__(self, index: int, prompt: Prompt, options: ChoiceOptions, texts: TokenTexts) -> None:
        self._index = index
        self._prompt = prompt
        self._options = options
        self._texts = texts
        self._text: list[str] = []
        self._rows: list[TokenInfo] = []
        self._token_ids: list[int] = []
        self._prompt_rows: list[TokenLogprobs] | None = None

    def push(self, delta: ChoiceDelta) -> str | None:
        """The choice's JSON, once the delta that ends it is here."""
        self._text.append(delta.text)
        self._rows += delta.tokens or ()
        self._token_ids += delta.token_ids
        if delta.prompt_logprobs is not None:
            self._prompt_rows = delta.prompt_logprobs
        return None if delta.finish_reason is None else self._render(delta)

    def _render(self, last: ChoiceDelta) -> str:
        assert last.finish_reason is not None
        options = self._options
        choice: dict[str, Any] = {
            "text": "".join(self._text),
            "index": self._index,
            "logprobs": None if options.logprobs is None else logprobs_object(self._rows, options.logprobs),
            "finish_reason": last.finish_reason.value,
            "stop_reason": last.stop_reason,
        }
        if options.return_token_ids:
            choice["prompt_token_ids"] = self._prompt.token_ids
            choice["token_ids"] = self._token_ids
        if options.prompt_logprobs is not None:
            rows = self._prompt_rows or []
            choice["prompt_logprobs"] = prompt_logprobs_object(self._prompt, rows, options.prompt_logprobs, self._texts)
        return _encode(choice)


class ChunkRenderer:
    """The deltas of all choices, each as the JSON of its chunks' one choice. Ends apart from text: some clients
    look at the one or the other."""

    def __init__(self, prompts: Sequence[Prompt], n: int, options: ChoiceOptions) -> None:
        self._prompts = prompts
        self._n = n
        self._options = options
        self._begun: set[int] = set()

    def chunks(self, delta: ChoiceDelta) -> Iterator[str]:
        first = self._options.return_token_ids and delta.index not in self._begun
        self._begun.add(delta.index)
        if delta.text or delta.tokens or first or (self._options.return_token_ids and delta.token_ids):
            yield from self._split(delta, first)
        if delta.finish_reason is not None:
            yield _encode({
                "text": "",
                "index": delta.index,
                "logprobs": None,
                "finish_reason": delta.finish_reason.value,
                "stop_reason": delta.stop_reason,
            })  # fmt: skip

    def _split(self, delta: ChoiceDelta, first: bool) -> Iterator[str]:
        """One chunk, or as many as keep each short enough: a long prompt is echoed piece by piece."""
        chunk = _encode(self._choice(delta, first))
        text, ids, rows = len(delta.text) // 2, len(delta.token_ids) // 2, len(delta.tokens or ()) // 2
        small = len(chunk) < CHUNK_BYTES // 4 or len(chunk.encode()) <= CHUNK_BYTES
        if small or not (text or ids or rows):
            yield chunk
            return
        early = replace(
            delta, text=delta.text[:text], token_ids=delta.token_ids[:ids], tokens=delta.tokens and delta.tokens[:rows]
        )
        late = replace(
            delta, text=delta.text[text:], token_ids=delta.token_ids[ids:], tokens=delta.tokens and delta.tokens[rows:]
        )
        yield from self._split(early, first)
        yield from self._split(late, False)

    def _choice(self, delta: ChoiceDelta, first: bool) -> dict[str, Any]:
        options = self._options
        choice: dict[str, Any] = {
            "text": delta.text,
            "index": delta.index,
            "logprobs": None if options.logprobs is None else logprobs_object(delta.tokens or (), options.logprobs),
            "finish_reason": None,
        }
        if options.return_token_ids:
            if first:
                choice["prompt_token_ids"] = self._prompts[delta.index // self._n].token_ids
            choice["token_ids"] = delta.token_ids
        return choice
