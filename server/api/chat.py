"""POST /v1/chat/completions: messages become a prompt by the operator's template, and the rest is a completion.

Without a template it says why not: a base GPT-2 holds no conversations.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from model.tokenizer import Tokenizer
from server.api.aliases import ALIASES, CONTEXTS, ENDLESS, read_context
from server.api.aside import parse_aside, render_aside
from server.api.auth import caller_of
from server.api.body import read_body
from server.api.chat_rendering import ChatShape
from server.api.chat_schemas import ChatAnswer, ChatBody, chat_schema
from server.api.chat_template import ChatTemplate, Message
from server.api.completions import CompletionService
from server.api.limits import Limits
from server.api.parsing import CompletionRequest, parse_fields
from server.api.prompts import start_of
from server.api.reading import at_most, read_body_fields, read_object
from server.api.sse import STREAMED
from server.api.unsupported import refusal
from server.errors import ContextLengthExceeded, InvalidRequest

NO_CHAT = (
    "The model is a base GPT-2: it has no chat template, so it completes text and holds no conversations. "
    "Use POST /v1/completions instead. (An operator whose model was tuned for chat starts the server with "
    "--chat-template.)"
)
ROLES = ("system", "developer", "user", "assistant")
# Fields of completions, and of chat elsewhere, that are not honoured here, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "prompt": (),
    "suffix": ("",),
    "echo": (False,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "store": (False,),
}
LENGTHS = ("max_tokens", "max_completion_tokens")  # -1 asks for what the context has left, as without it


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    body: ChatBody
    messages: list[Message]
    fields: dict[str, Any]  # what is left of the body: a completion's, but for its prompt


def parse_chat(raw: bytes, limits: Limits) -> ChatRequest:
    """Raises InvalidRequest."""
    fields = read_object(raw)
    for name, idle in REFUSED.items():
        if fields.get(name) is not None and fields[name] not in idle:
            raise refusal(name)
    for name, value in fields.items():
        alias = ALIASES.get(name)
        if alias is not None and alias.name in REFUSED and alias.read(value) not in (None, *REFUSED[alias.name]):
            raise refusal(name)
        if name in CONTEXTS and read_context({name: value}, 0, limits) is not None:
            raise refusal(name)
    fields = {name: value for name, value in fields.items() if name not in LENGTHS or value != ENDLESS}
    body = read_body_fields(ChatBody, fields)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        message = "'max_tokens' and 'max_completion_tokens' cannot be given together."
        raise InvalidRequest(message, "max_completion_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    at_most("top_logprobs", body.top_logprobs, limits.max_logprobs)
    rest = {name: value for name, value in fields.items() if name not in REFUSED and name not in ChatBody.model_fields}
    rest["max_tokens"] = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    rest["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    rest = {name: value for name, value in rest.items() if value is not None}
    return ChatRequest(body=body, messages=read_messages(body.messages), fields=rest)


def read_messages(value: Any) -> list[Message]:
    """Roles and texts. Raises InvalidRequest."""
    if not isinstance(value, list) or not value:
        raise _invalid("messages", "expected an array of messages, and at least one")
    return [_read_message(f"messages.{place}", item) for place, item in enumerate(value)]


def _read_message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise _invalid(where, "expected an object")
    if value.get("role") not in ROLES:
        raise _invalid(f"{where}.role", f"expected one of {', '.join(ROLES)}")
    for name in ("tool_calls", "function_call", "audio"):
        if value.get(name):
            raise refusal(name)
    message = {"role": value["role"], "content": _read_content(f"{where}.content", value.get("content"))}
    if value.get("name") is not None:
        if not isinstance(value["name"], str):
            raise _invalid(f"{where}.name", "expected a string")
        message["name"] = value["name"]
    return message


def _read_content(where: str, value: Any) -> str:
    """A text, or parts that are texts, each a line of its own."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _invalid(where, "expected a string or an array of parts")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise _invalid(where, "expected parts of type 'text' alone: this model reads nothing else")
    return "\n".join(map(str, texts))


def _invalid(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{name}': {why}.", "messages", "invalid_value")


def write_prompt(template: ChatTemplate, chat: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """Special tokens are the template's to write: in a message their names are plain text, and end no turn.

    Raises InvalidRequest.
    """
    mark = f"{secrets.randbits(128):039d}"  # no client can guess it, and no change of case harms it
    special = sorted(tokenizer.special_tokens, key=len, reverse=True)
    messages = [{name: _hide(text, special, mark) for name, text in message.items()} for message in chat.messages]
    text = template.render(messages, add_generation_prompt=chat.body.add_generation_prompt)
    ids: list[int] = []
    for place, piece in enumerate(re.split(f"{mark}(\\d{{4}})", text)):
        ids += tokenizer.encode_plain(special[int(piece)]) if place % 2 else tokenizer.encode(piece)
    return ids or start_of(tokenizer)


def _hide(text: str, names: Collection[str], mark: str) -> str:
    for number, name in enumerate(names):
        text = text.replace(name, f"{mark}{number:04d}")
    return text


async def answer_chat(
    service: CompletionService, template: ChatTemplate, request: Request, engine_name: str | None
) -> Response:
    """Raises ServerError or ClientGone."""
    raw = await read_body(request.scope, request.receive, service.limits)
    chat = await parse_aside(parse_chat, raw, service.limits)
    _parse(chat.fields, [0], service.limits)  # before any work is done for it
    service.engine.check_quota(caller_of(request.scope).name)
    ids = await render_aside(write_prompt, template, chat, service.tokenizer)
    asked = _parse(chat.fields, ids, service.limits)
    shape = ChatShape(logprobs=asked.alternatives)
    try:
        return await service.complete(asked, shape, "chatcmpl-", request, engine_name)
    except ContextLengthExceeded as error:  # it speaks of a prompt
        raise InvalidRequest(error.message, "messages", error.code) from None


def _parse(fields: Mapping[str, Any], ids: list[int], limits: Limits) -> CompletionRequest:
    """A chat answer is as long as the context lets it be, unless it is told otherwise."""
    return parse_fields({**fields, "prompt": ids}, limits, limits.max_model_len)


def chat_routes(service: CompletionService, template: ChatTemplate | None) -> APIRouter:
    router = APIRouter(tags=["chat"])
    if template is None:

        @router.post("/v1/chat/completions")
        @router.post("/v1/engines/{engine_id:path}/chat/completions", include_in_schema=False)
        async def say_why_not() -> Response:
            raise InvalidRequest(NO_CHAT, "messages", "chat_not_supported")

        return router

    schema = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": chat_schema(service.limits)}},
        }
    }
    answers: dict[int | str, dict[str, Any]] = {200: {"model": ChatAnswer, "content": STREAMED}}

    @router.post("/v1/chat/completions", openapi_extra=schema, responses=answers)
    @router.post("/chat/completions", include_in_schema=False)
    async def create_chat_completion(request: Request) -> Response:
        return await answer_chat(service, template, request, None)

    @router.post("/v1/engines/{engine_id:path}/chat/completions", openapi_extra=schema, responses=answers)
    async def create_engine_chat_completion(request: Request, engine_id: str) -> Response:
        return await answer_chat(service, template, request, engine_id)

    return router
