"""Text to token ids and back, in vLLM's shape; what evaluation harnesses ask instead of a tokenizer of their own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from model.tokenizer import Tokenizer
from server.api.body import read_body
from server.api.limits import Limits
from server.api.models import ServedModel
from server.api.prompts import read_ids, tokenize
from server.api.reading import ignored_header, read_body_fields, read_object, unknown_fields
from server.api.schemas import (
    DetokenizeAnswer,
    DetokenizeBody,
    TokenizeAnswer,
    TokenizeBody,
    detokenize_schema,
    tokenize_schema,
)
from server.engine.output import TokenTexts
from server.errors import InvalidRequest


def tokenize_routes(model: ServedModel, tokenizer: Tokenizer, texts: TokenTexts, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["tokenizer"])

    @router.post("/tokenize", openapi_extra=_body(tokenize_schema()), responses={200: {"model": TokenizeAnswer}})
    async def encode_text(request: Request) -> Response:
        fields = read_object(await read_body(request.scope, request.receive, limits))
        body = read_body_fields(TokenizeBody, fields)
        model.resolve(body.model)
        given = [text for text in (body.prompt, body.content, body.text) if text is not None]
        if len(given) != 1:
            raise InvalidRequest("Exactly one of 'prompt', 'content' and 'text' is needed.", "prompt")
        tokens = await tokenize(given[0], tokenizer)
        return JSONResponse({
            "count": len(tokens),
            "max_model_len": model.max_model_len,
            "tokens": tokens,
            "token_strs": [texts[token] for token in tokens] if body.return_token_strs else None,
        }, headers=ignored_header(unknown_fields(fields, TokenizeBody)))  # fmt: skip

    @router.post(
        "/detokenize", openapi_extra=_body(detokenize_schema(limits)), responses={200: {"model": DetokenizeAnswer}}
    )
    async def decode_tokens(request: Request) -> Response:
        fields = read_object(await read_body(request.scope, request.receive, limits))
        body = read_body_fields(DetokenizeBody, fields)
        model.resolve(body.model)
        prompt = tokenizer.decode(read_ids(body.tokens, limits, "tokens"))
        return JSONResponse({"prompt": prompt}, headers=ignored_header(unknown_fields(fields, DetokenizeBody)))

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> JSONResponse:
        return JSONResponse({
            "tokenizer_class": tokenizer.kind,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "unk_token": tokenizer.unk_token,
            "pad_token": None,
            "add_bos_token": False,
            "add_prefix_space": False,
            "model_max_length": model.max_model_len,
            "chat_template": None,
        })  # fmt: skip

    return router


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
