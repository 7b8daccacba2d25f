"""The wire of chat: what its requests have beside a completion's fields, and the shape of its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from server.api.limits import Limits
from server.api.schemas import INT64_MAX, Integer, UsageAnswer, Wire, completion_schema, request_schema

_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]},
        "name": {"type": "string"},
    },
    "required": ["role", "content"],
}
Messages = Annotated[Any, WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1})]

# of completions, and not of chat
LEFT_OUT = (
    "prompt", "suffix", "echo", "prompt_logprobs", "return_token_ids", "truncate_prompt_tokens", "truncation_side",
)  # fmt: skip


class ChatBody(Wire):
    """What chat reads itself; the rest are fields of completions."""

    messages: Messages = Field(description="what was said so far, as texts")
    max_completion_tokens: Integer | None = Field(
        default=None, ge=1, le=INT64_MAX, description="default: what the context has left"
    )
    max_tokens: Integer | None = Field(
        default=None, ge=1, le=INT64_MAX, description="older name of max_completion_tokens"
    )
    logprobs: bool = False
    top_logprobs: Integer | None = Field(default=None, ge=0, description="alternatives shown; needs logprobs")
    add_generation_prompt: bool = Field(default=True, description="the template opens the assistant's turn")


class ChatTopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    usage: UsageAnswer


def chat_schema(limits: Limits) -> dict[str, Any]:
    """A chat's own fields first, then those it has in common with completions."""
    schema, common = request_schema(ChatBody), completion_schema(limits)
    schema["properties"]["top_logprobs"]["anyOf"][0]["maximum"] = limits.max_logprobs
    shared = {name: field for name, field in common["properties"].items() if name not in LEFT_OUT}
    schema["properties"] = {"model": shared.pop("model"), **shared, **schema["properties"]}
    return schema
