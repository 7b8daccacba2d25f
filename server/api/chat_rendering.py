"""A choice as /v1/chat/completions writes it: a message, or deltas of one; and chat's own shape of logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.request import ChoiceDelta, Prompt, TokenInfo

BYTES = "bytes:"  # how a row names a token whose bytes are no text by themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShape:
    logprobs: int | None = None  # how many alternatives; None where logprobs are off
    return_token_ids: bool = False
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def whole(self, choice: ChoiceDelta, prompt: Prompt) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": choice.index, "message": message, "logprobs": self._rows(choice), **_reasons(choice)}

    def beginning(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, delta: ChoiceDelta, prompt: Prompt | None) -> dict[str, Any]:
        gained = {"content": delta.text}
        return {"index": delta.index, "delta": gained, "logprobs": self._rows(delta), "finish_reason": None}

    def end(self, delta: ChoiceDelta) -> dict[str, Any]:
        return {"index": delta.index, "delta": {}, "logprobs": None, **_reasons(delta)}

    def _rows(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        return None if self.logprobs is None else chat_logprobs(delta.tokens or (), self.logprobs)


def _reasons(delta: ChoiceDelta) -> dict[str, Any]:
    assert delta.finish_reason is not None
    return {"finish_reason": delta.finish_reason.value, "stop_reason": delta.stop_reason}


def chat_logprobs(rows: Sequence[TokenInfo], count: int) -> dict[str, Any]:
    """Of the most likely tokens exactly `count`: the one that was picked has its own score beside them."""
    content = []
    for row in rows:
        assert row.logprob is not None
        top = list((row.top or {}).items())[:count]
        likely = [_scored(name, logprob) for name, logprob in top]
        content.append({**_scored(row.token, row.logprob), "top_logprobs": likely})
    return {"content": content, "refusal": None}


def _scored(name: str, logprob: float) -> dict[str, Any]:
    if name.startswith(BYTES + "\\x"):
        shown = name.removeprefix(BYTES)
        return {"token": shown, "logprob": logprob, "bytes": list(bytes.fromhex(shown.replace("\\x", "")))}
    return {"token": name, "logprob": logprob, "bytes": list(name.encode())}
