"""Text to token ids and back, in vLLM's shape; what evaluation harnesses ask instead of a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, TypeVarTuple

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from model.tokenizer import Tokenizer
from server.api.aside import parse_aside, tokenize_aside
from server.api.body import read_body
from server.api.limits import Limits
from server.api.models import ServedModel
from server.api.prompts import INLINE_SIZE, read_ids, tokenize
from server.api.reading import ignored_header, read_body_fields, read_object, unknown_fields
from server.api.schemas import (
    DetokenizeAnswer,
    DetokenizeBody,
    TokenizeAnswer,
    TokenizeBody,
    Wire,
    detokenize_schema,
    tokenize_schema,
)
from server.engine.output import TokenTexts
from server.errors import InvalidRequest

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Body = TypeVar("Body", bound=Wire)


def tokenize_routes(model: ServedModel, tokenizer: Tokenizer, texts: TokenTexts, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["tokenizer"])

    @router.post("/tokenize", openapi_extra=_body(tokenize_schema()), responses={200: {"model": TokenizeAnswer}})
    async def encode_text(request: Request) -> Response:
        raw = await read_body(request.scope, request.receive, limits)
        fields, body = await parse_aside(_read, raw, TokenizeBody)
        model.resolve(body.model)
        given = [text for text in (body.prompt, body.content, body.text) if text is not None]
        if len(given) != 1:
            raise InvalidRequest("Exactly one of 'prompt', 'content' and 'text' is needed.", "prompt")
        tokens = await tokenize(given[0], tokenizer, add_special_tokens=body.add_special_tokens)
        shown = await _aside(_named, tokens, texts) if body.return_token_strs else None
        return _json(
            {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens, "token_strs": shown},
            fields, TokenizeBody,
        )  # fmt: skip

    @router.post(
        "/detokenize", openapi_extra=_body(detokenize_schema(limits)), responses={200: {"model": DetokenizeAnswer}}
    )
    async def decode_tokens(request: Request) -> Response:
        raw = await read_body(request.scope, request.receive, limits)
        fields, body = await parse_aside(_read, raw, DetokenizeBody)
        model.resolve(body.model)
        prompt = await _aside(_decode, body.tokens, tokenizer, limits)
        return _json({"prompt": prompt}, fields, DetokenizeBody)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> JSONResponse:
        return JSONResponse({
            "tokenizer_class": tokenizer.kind,
            "bos_token": tokenizer.named.get("bos_token"),
            "eos_token": tokenizer.named.get("eos_token"),
            "unk_token": tokenizer.named.get("unk_token"),
            "pad_token": tokenizer.named.get("pad_token"),
            "add_bos_token": tokenizer.options.get("add_bos_token") is True,
            "add_prefix_space": tokenizer.options.get("add_prefix_space") is True,
            "model_max_length": model.max_model_len,
            "chat_template": None,
        })  # fmt: skip

    return router


def _read(raw: bytes, body: type[Body]) -> tuple[dict[str, Any], Body]:
    fields = read_object(raw)
    return fields, read_body_fields(body, fields)


async def _aside(work: Callable[[list[int], *Ts], T], tokens: list[int], *rest: *Ts) -> T:
    return work(tokens, *rest) if len(tokens) <= INLINE_SIZE else await tokenize_aside(work, tokens, *rest)


def _named(tokens: list[int], texts: TokenTexts) -> list[str]:
    return [texts[token] for token in tokens]


def _decode(tokens: list[int], tokenizer: Tokenizer, limits: Limits) -> str:
    return tokenizer.decode(read_ids(tokens, limits, "tokens"))


def _json(content: dict[str, Any], fields: Mapping[str, Any], body: type[Wire]) -> Response:
    """msgspec writes a million characters in two milliseconds; the standard library takes thirty."""
    headers = ignored_header(unknown_fields(fields, body))
    return Response(msgspec.json.encode(content), headers=headers, media_type="application/json")


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
