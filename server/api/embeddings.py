"""POST /v1/embeddings: the mean of a text's hidden states after the last norm. GPT-2 was not trained to embed; it can.

A vector travels as the bytes of its float32 numbers, which is what `encoding_format: base64` shows.
"""

from __future__ import annotations

import base64
import json
import secrets
from array import array
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from model.sampling_params import SamplingParams
from server.api.aside import parse_aside
from server.api.auth import caller_of
from server.api.body import read_body
from server.api.completions import CompletionService, cache_salt, while_there
from server.api.limits import Limits
from server.api.prompts import encode, read_prompts
from server.api.reading import ignored_header, read_body_fields, read_object, unknown_fields
from server.api.schemas import EmbeddingBody, embedding_schema
from server.engine.request import Generation, GenerationRequest, Prompt
from server.engine.variants import Variant
from server.errors import ContextLengthExceeded, InvalidRequest


class EmbeddingObject(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


def parse_embedding(raw: bytes, limits: Limits) -> tuple[EmbeddingBody, tuple[str | list[int], ...], tuple[str, ...]]:
    """The body, its inputs, and the names of fields nobody knows. Raises InvalidRequest."""
    fields = read_object(raw)
    body = read_body_fields(EmbeddingBody, fields)
    if "dimensions" in fields:  # a vector has the width of the model
        raise InvalidRequest(
            "'dimensions' is not supported by this server. Leave it out, or set it to null.",
            "dimensions",
            "unsupported_parameter",
        )
    try:
        inputs = read_prompts(body.input, limits)
    except InvalidRequest as error:  # they speak of 'prompt'
        raise InvalidRequest(error.message.replace("'prompt'", "'input'"), "input", error.code) from None
    if "" in inputs:
        raise InvalidRequest("Invalid 'input': a text cannot be empty.", "input", "empty_string")
    return body, inputs, unknown_fields(fields, EmbeddingBody)


async def answer_embedding(service: CompletionService, request: Request, engine_name: str | None) -> Response:
    """Raises ServerError or ClientGone."""
    raw = await read_body(request.scope, request.receive, service.limits)
    body, inputs, ignored = await parse_aside(parse_embedding, raw, service.limits)
    name = service.model.resolve(body.model) if engine_name is None else service.model.resolve_engine(engine_name)
    caller = caller_of(request.scope)
    service.engine.check_quota(caller.name)
    prompts = await encode(inputs, service.tokenizer, None)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest > service.limits.max_model_len:
        service.engine.charge(caller.name, sum(len(prompt.token_ids) for prompt in prompts))
        raise ContextLengthExceeded(service.limits.max_model_len, longest, 0)
    call = _call(prompts, cache_salt(caller, None), service.model.variant(name), caller.name)
    generation = service.engine.submit(call)
    request.scope["generation"] = generation
    service.running.add(call.id)
    try:
        vectors = await while_there(_collect(generation, body.encoding_format), request)
    finally:
        service.running.discard(call.id)
        await generation.aclose()
    headers = {"openai-model": name, **ignored_header(ignored)}
    tokens = generation.usage.prompt_tokens
    data = ",".join(
        f'{{"object":"embedding","index":{index},"embedding":{vectors[index]}}}' for index in sorted(vectors)
    )
    usage = json.dumps({"prompt_tokens": tokens, "total_tokens": tokens})
    content = f'{{"object":"list","data":[{data}],"model":{json.dumps(name)},"usage":{usage}}}'
    return Response(content, headers=headers, media_type="application/json")


def _call(prompts: list[Prompt], salt: bytes, variant: Variant | None, key_name: str) -> GenerationRequest:
    params = SamplingParams(seed=0, max_tokens=0, pooled=True)
    id_ = f"embd-{secrets.token_hex(14)}"
    return GenerationRequest(id=id_, prompts=prompts, params=params, salt=salt, variant=variant, key_name=key_name)


async def _collect(generation: Generation, encoding: str) -> dict[int, str]:
    """Each vector as JSON, by the index of its input; rendered as it comes, not all in one go."""
    vectors = {}
    async for delta in generation:
        if delta.pooled is not None:
            vectors[delta.index] = _render(delta.pooled, encoding)
    return vectors


def _render(raw: bytes, encoding: str) -> str:
    if encoding == "base64":
        return json.dumps(base64.b64encode(raw).decode("ascii"))
    numbers = array("f")
    numbers.frombytes(raw)
    return json.dumps(numbers.tolist(), allow_nan=False)


def embedding_routes(service: CompletionService) -> APIRouter:
    router = APIRouter(tags=["embeddings"])
    schema: dict[str, Any] = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": embedding_schema(service.limits)}},
        }
    }
    answers: dict[int | str, dict[str, Any]] = {200: {"model": EmbeddingAnswer}}

    @router.post("/v1/embeddings", openapi_extra=schema, responses=answers)
    @router.post("/embeddings", include_in_schema=False)
    async def create_embedding(request: Request) -> Response:
        return await answer_embedding(service, request, None)

    @router.post("/v1/engines/{engine_id:path}/embeddings", openapi_extra=schema, responses=answers)
    async def create_engine_embedding(request: Request, engine_id: str) -> Response:
        return await answer_embedding(service, request, engine_id)

    return router
