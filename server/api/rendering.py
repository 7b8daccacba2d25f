"""A choice's deltas to the JSON of the wire, whole or in chunks. Both are made of the same pieces.

Hot path: a chunk is one small dict between two constant strings. No models here, and no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from model.step import TokenLogprobs
from server.engine.output import LOGPROB_FLOOR, TokenTexts
from server.engine.request import ChoiceDelta, Prompt, TokenInfo, Usage

CHUNK_BYTES = 64 << 10  # old clients drop the stream at a line of 128 KB

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What is equal in every chunk of an answer."""

    id: str
    object: str  # what kind of thing it says it is
    created: int  # unix seconds
    model: str
    fingerprint: str

    def wrap(self, choices: str, usage: str = "") -> bytes:
        """choices, usage: JSON already; an empty usage leaves the key out."""
        head = f'"id":{_encode(self.id)},"object":"{self.object}","created":{self.created}'
        tail = f'"system_fingerprint":{_encode(self.fingerprint)}' + (f',"usage":{usage}' if usage else "")
        return f'{{{head},"model":{_encode(self.model)},"choices":[{choices}],{tail}}}'.encode()


class Shape(Protocol):
    """How an API writes a choice: the whole of it, or in pieces between a beginning and an end."""

    @property
    def whole_object(self) -> str: ...
    @property
    def chunk_object(self) -> str: ...
    @property
    def return_token_ids(self) -> bool:
        """A piece without text is worth a chunk where it has tokens."""
        ...

    def whole(self, choice: ChoiceDelta, prompt: Prompt) -> dict[str, Any]:
        """choice: all its deltas as one."""
        ...

    def beginning(self, index: int) -> dict[str, Any] | None: ...
    def piece(self, delta: ChoiceDelta, prompt: Prompt | None) -> dict[str, Any]:
        """prompt: with a choice's first piece."""
        ...

    def end(self, delta: ChoiceDelta) -> dict[str, Any]: ...


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionShape:
    """Choices as /v1/completions has them, with what the client wants to see of them."""

    texts: TokenTexts
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"

    def whole(self, choice: ChoiceDelta, prompt: Prompt) -> dict[str, Any]:
        shown = {**self._common(choice), "finish_reason": _reason(choice), "stop_reason": choice.stop_reason}
        if self.return_token_ids:
            shown["prompt_token_ids"] = prompt.token_ids
            shown["token_ids"] = choice.token_ids
        if self.prompt_logprobs is not None:
            rows = choice.prompt_logprobs or []
            shown["prompt_logprobs"] = prompt_logprobs_object(prompt, rows, self.prompt_logprobs, self.texts)
        return shown

    def beginning(self, _: int) -> None:
        return None

    def piece(self, delta: ChoiceDelta, prompt: Prompt | None) -> dict[str, Any]:
        shown = {**self._common(delta), "finish_reason": None}
        if self.return_token_ids:
            if prompt is not None:
                shown["prompt_token_ids"] = prompt.token_ids
            shown["token_ids"] = delta.token_ids
        return shown

    def end(self, delta: ChoiceDelta) -> dict[str, Any]:
        """As every chunk it has what was asked for, which is no tokens: some clients look without asking."""
        nothing = replace(delta, text="", token_ids=[], tokens=[])
        reasons = {"finish_reason": _reason(delta), "stop_reason": delta.stop_reason}
        return {**self._common(nothing), **reasons, **({"token_ids": []} if self.return_token_ids else {})}

    def _common(self, delta: ChoiceDelta) -> dict[str, Any]:
        logprobs = None if self.logprobs is None else logprobs_object(delta.tokens or (), self.logprobs)
        return {"text": delta.text, "index": delta.index, "logprobs": logprobs}


def _reason(delta: ChoiceDelta) -> str:
    assert delta.finish_reason is not None
    return delta.finish_reason.value


class ChoiceCollector:
    """The deltas of one choice, joined."""

    def __init__(self, prompt: Prompt, shape: Shape) -> None:
        self._prompt = prompt
        self._shape = shape
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
        if delta.finish_reason is None:
            return None
        rows, text = self._rows, "".join(self._text)
        choice = replace(delta, text=text, token_ids=self._token_ids, tokens=rows, prompt_logprobs=self._prompt_rows)
        return _encode(self._shape.whole(choice, self._prompt))


class ChunkRenderer:
    """The deltas of all choices, each as the JSON of its chunks' one choice. Ends apart from text: some clients
    look at the one or the other."""

    def __init__(self, prompts: Sequence[Prompt], n: int, shape: Shape) -> None:
        self._prompts = prompts
        self._n = n
        self._shape = shape
        self._begun: set[int] = set()

    def chunks(self, delta: ChoiceDelta) -> Iterator[str]:
        shape, first = self._shape, None
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            first = self._prompts[delta.index // self._n]
            beginning = shape.beginning(delta.index)
            if beginning is not None:
                yield _encode(beginning)
        with_ids = shape.return_token_ids and (first is not None or bool(delta.token_ids))
        if delta.text or delta.tokens or with_ids:
            yield from self._split(delta, first)
        if delta.finish_reason is not None:
            yield _encode(shape.end(delta))

    def _split(self, delta: ChoiceDelta, first: Prompt | None) -> Iterator[str]:
        """One chunk, or as many as keep each short enough: a long prompt is echoed piece by piece."""
        chunk = _encode(self._shape.piece(delta, first))
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
        yield from self._split(late, None)
