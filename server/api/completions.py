"""POST /v1/completions: a request's way from its bytes to its answer, whole or streamed.

A client that leaves is noticed either way, and closing the generation is what frees its blocks.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import string
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.api.aliases import RANDOM
from server.api.aside import parse_aside
from server.api.auth import caller_of
from server.api.bans import check_any_left
from server.api.body import ClientGone, read_body, until_gone
from server.api.errors import INTERNAL, error_object
from server.api.keys import Caller
from server.api.limits import Limits
from server.api.models import ServedModel
from server.api.parsing import CompletionRequest, parse_completion
from server.api.phrases import Phrases
from server.api.prompts import encode, fit
from server.api.reading import ignored_header
from server.api.rendering import ChoiceCollector, ChunkRenderer, CompletionShape, Envelope, Shape, usage_json
from server.api.schemas import CompletionAnswer, StreamOptions, completion_schema
from server.api.sse import DONE, STREAMED, EventStream, event
from server.engine.grammars import GrammarChecker
from server.engine.output import TokenTexts
from server.engine.request import Generation, GenerationEngine, GenerationRequest, Prompt
from server.engine.variants import Variant
from server.errors import ContextLengthExceeded, InvalidRequest, ServerError
from server.worker.messages import BACKGROUND

log = logging.getLogger(__name__)

ID_ALPHABET = string.ascii_letters + string.digits
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionService:
    engine: GenerationEngine
    tokenizer: Tokenizer
    model: ServedModel
    limits: Limits
    texts: TokenTexts
    running: set[str]  # ids of the calls being answered; /load counts them
    phrases: Phrases
    grammars: GrammarChecker | None  # None where the vocabulary is not one of bytes

    async def answer(self, request: Request, engine_name: str | None) -> Response:
        """Raises ServerError or ClientGone before the answer's first byte; never after."""
        raw = await read_body(request.scope, request.receive, self.limits)
        asked = await parse_aside(parse_completion, raw, self.limits)
        return await self.complete(asked, self.shape(asked), "cmpl-", request, engine_name)

    def shape(self, asked: CompletionRequest) -> CompletionShape:
        return CompletionShape(
            texts=self.texts,
            logprobs=asked.alternatives,
            prompt_logprobs=asked.body.prompt_logprobs,
            return_token_ids=asked.body.return_token_ids,
        )

    async def complete(
        self, asked: CompletionRequest, shape: Shape, prefix: str, request: Request, engine_name: str | None
    ) -> Response:
        """prefix: of the answer's id. Raises as `answer` does."""
        name = self.model.resolve(asked.body.model) if engine_name is None else self.model.resolve_engine(engine_name)
        answer = await self.begin(asked, shape, prefix, caller_of(request.scope), name)
        request.scope["generation"] = answer.generation  # its usage is logged
        headers = {"openai-model": name, **ignored_header(asked.ignored)}
        if asked.body.stream:
            return EventStream(answer.events(), headers, answer.close)
        try:
            body = await while_there(answer.collect(), request)
        finally:
            await answer.close()
        return Response(body, headers=headers, media_type="application/json")

    async def begin(
        self,
        asked: CompletionRequest,
        shape: Shape,
        prefix: str,
        caller: Caller,
        name: str,
        *,
        background: bool = False,
    ) -> Answer:
        """name: of the model. background: nobody waits for it. To be closed. Raises ServerError."""
        created = int(time.time())
        if not background:
            self.engine.check_quota(caller.name)
        right = asked.body.truncation_side == "right"
        wholly = asked.body.add_special_tokens
        prompts = await encode(asked.prompts, self.tokenizer, asked.keep, keep_first=right, add_special_tokens=wholly)
        params = await self._params(asked, caller.client)
        explicit = asked.body.max_tokens is not None
        try:
            params = fit(prompts, params, self.limits, explicit=explicit, alike=asked.beam is not None)
        except ContextLengthExceeded:  # reading it was work all the same
            if not background:
                self.engine.charge(caller.name, sum(len(prompt.token_ids) for prompt in prompts))
            raise
        call = self._call(asked, prompts, params, prefix, caller, self.model.variant(name), background=background)
        envelope = Envelope(
            id=call.id if asked.body.request_id is None else prefix + asked.body.request_id,
            object=shape.chunk_object if asked.body.stream else shape.whole_object,
            created=created,
            model=name,
            fingerprint=self.model.fingerprint_of(name),
        )
        return Answer(call, self.engine.submit(call), envelope, shape, asked.stream_options, self.running)

    async def _params(self, asked: CompletionRequest, client: str) -> SamplingParams:
        """With what needs the vocabulary. Raises InvalidRequest or Overloaded."""
        params = await self.phrases.resolve(asked.params, asked.body)
        check_any_left(params, self.tokenizer.eos_token_ids, self.limits.vocab_size)
        if asked.structure is None:
            return params
        if self.grammars is None:
            param = asked.structure.param
            message = f"'{param}' needs a byte-level vocabulary with a token that ends a text; this model has none."
            raise InvalidRequest(message, param, "unsupported_parameter")
        return replace(params, grammar=await self.grammars.compile(asked.structure, client))

    def _call(
        self,
        asked: CompletionRequest,
        prompts: list[Prompt],
        params: SamplingParams,
        prefix: str,
        caller: Caller,
        variant: Variant | None,
        *,
        background: bool,
    ) -> GenerationRequest:
        body = asked.body
        return GenerationRequest(
            id=prefix + "".join(secrets.choice(ID_ALPHABET) for _ in range(28)),
            prompts=prompts,
            params=params,
            seeds=() if body.seed not in (None, RANDOM) else tuple(secrets.randbits(63) for _ in prompts),
            n=body.n,
            best_of=asked.best_of,
            beam=asked.beam,
            stop=asked.stop,
            include_stop_str_in_output=body.include_stop_str_in_output,
            echo=body.echo,
            skip_special_tokens=body.skip_special_tokens,
            tokens_as_ids=body.return_tokens_as_token_ids,
            priority=2 * BACKGROUND + body.priority if background else body.priority,
            salt=cache_salt(caller, body.cache_salt),
            variant=variant,
            key_name=caller.name,
        )


class Answer:
    """One call's answer in the making: consumes its generation once, in one of two ways."""

    def __init__(
        self,
        call: GenerationRequest,
        generation: Generation,
        envelope: Envelope,
        shape: Shape,
        stream_options: StreamOptions,
        running: set[str],
    ) -> None:
        self._call = call
        self.generation = generation
        self._envelope = envelope
        self._shape = shape
        self._stream_options = stream_options
        self._running = running
        running.add(call.id)

    async def collect(self) -> bytes:
        """Each choice is rendered when it ends, so no large answer is rendered in one go."""
        collectors: dict[int, ChoiceCollector] = {}
        done: dict[int, str] = {}
        async for delta in self.generation:
            if delta.index not in collectors:
                prompt = self._call.prompts[delta.index // self._call.n]
                collectors[delta.index] = ChoiceCollector(prompt, self._shape)
            choice = collectors[delta.index].push(delta)
            if choice is not None:
                done[delta.index] = choice
        assert len(done) == len(self._call.prompts) * self._call.n
        choices = ",".join(done[index] for index in sorted(done))
        return self._envelope.wrap(choices, usage_json(self.generation.usage))

    async def events(self) -> AsyncIterator[bytes]:
        """Only a clean end has [DONE]. An error after the headers is one event, and the last."""
        try:
            async for data in self._chunks():
                yield event(data)
        except ServerError as error:
            yield event(json.dumps(error_object(error), ensure_ascii=False).encode())
        except Exception:
            log.exception("request %s failed in its stream", self._call.id)
            yield event(json.dumps(error_object(INTERNAL)).encode())
        else:
            yield DONE

    async def _chunks(self) -> AsyncIterator[bytes]:
        renderer = ChunkRenderer(self._call.prompts, self._call.n, self._shape)
        with_usage = self._stream_options.include_usage
        continuous = with_usage and self._stream_options.continuous_usage_stats
        usage = "null" if with_usage else ""
        told = 0  # tokens of the deltas so far: the generation may be steps ahead of its reader
        async for delta in self.generation:
            told += len(delta.token_ids)
            if continuous:
                usage = usage_json(replace(self.generation.usage, completion_tokens=told))
            for choice in renderer.chunks(delta):
                yield self._envelope.wrap(choice, usage)
        if with_usage:
            yield self._envelope.wrap("", usage_json(self.generation.usage))

    async def close(self) -> None:
        self._running.discard(self._call.id)
        await self.generation.aclose()


async def while_there(work: Coroutine[Any, Any, T], request: Request) -> T:
    """The work's result, unless the client leaves first: then it is cancelled. Raises ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def cache_salt(caller: Caller, salt: str | None) -> bytes:
    """Prefix-cache entries are shared among one caller's requests only, and within one cache_salt of its."""
    if not caller.name and salt is None:
        return b""
    return hashlib.sha256(f"{caller.name}\0{salt or ''}".encode()).digest()


def completion_routes(service: CompletionService) -> APIRouter:
    router = APIRouter(tags=["completions"])
    schema = {"requestBody": {"content": {"application/json": {"schema": completion_schema(service.limits)}}}}
    answers: dict[int | str, dict[str, Any]] = {200: {"model": CompletionAnswer, "content": STREAMED}}

    @router.post("/v1/completions", openapi_extra=schema, responses=answers)
    @router.post("/completions", include_in_schema=False)
    @router.post("/invocations", include_in_schema=False)  # SageMaker's name for it
    async def create_completion(request: Request) -> Response:
        return await service.answer(request, None)

    @router.post("/v1/engines/{engine_id:path}/completions", openapi_extra=schema, responses=answers)
    @router.post("/engines/{engine_id:path}/completions", include_in_schema=False)
    async def create_engine_completion(request: Request, engine_id: str) -> Response:
        return await service.answer(request, engine_id)

    return router
