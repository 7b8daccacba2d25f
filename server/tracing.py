"""OpenTelemetry spans of requests, by the gen_ai semantic conventions. Needs the extra `[otel]`; assembly imports it
only where the standard OTEL_* variables ask for traces, so otherwise it costs nothing.

A span for the HTTP request, which continues the caller's trace where there is a `traceparent`, and below it one for
the inference. Neither holds text, token ids or keys.
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import time

from opentelemetry import context, propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine.request import ChoiceDelta, Generation, GenerationEngine, GenerationRequest, Usage
from server.errors import ServerError

NAME = "gpt2-server"


def exporting_tracer(version: str) -> Tracer:
    """Sends spans, in the background, where the OTEL_EXPORTER_OTLP_* variables say."""
    provider = TracerProvider(resource=Resource.create({"service.name": NAME, "service.version": version}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer(NAME, version)


class TraceMiddleware:
    """The outermost of all: what the application does happens within its span."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(
            scope["method"],
            context=propagate.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "url.scheme": scope["scheme"]},
        )

        async def send_watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        token = context.attach(trace.set_span_in_context(span))
        try:
            await self._app(scope, receive, send_watched)
        finally:
            context.detach(token)
            route = getattr(scope.get("route"), "path", None)
            if route is not None:  # the template: paths are the client's
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            span.end()


class TracedEngine:
    """An engine, with a span around each generation."""

    def __init__(self, engine: GenerationEngine, tracer: Tracer, model: str) -> None:
        self._engine = engine
        self._tracer = tracer
        self._model = model

    @property
    def ready(self) -> bool:
        return self._engine.ready

    @property
    def healthy(self) -> bool:
        return self._engine.healthy

    def check_quota(self, key_name: str) -> None:
        self._engine.check_quota(key_name)

    def charge(self, key_name: str, tokens: int) -> None:
        self._engine.charge(key_name, tokens)

    def submit(self, request: GenerationRequest) -> Generation:
        operation = "embeddings" if request.params.pooled else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            kind=SpanKind.INTERNAL,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": NAME,
                "gen_ai.request.model": self._model,
                "gen_ai.request.choice.count": request.n,
                "gen_ai.request.max_tokens": request.params.max_tokens,
                "gen_ai.request.temperature": request.params.temperature,
                "gen_ai.request.top_p": request.params.top_p,
                "gen_ai.request.frequency_penalty": request.params.frequency_penalty,
                "gen_ai.request.presence_penalty": request.params.presence_penalty,
                "gen_ai.response.model": self._model,
                "gen_ai.response.id": request.id,
            },
        )
        if request.params.top_k is not None:
            span.set_attribute("gen_ai.request.top_k", request.params.top_k)
        try:
            return TracedGeneration(self._engine.submit(request), span)
        except ServerError as error:
            _fail(span, error)
            span.end()
            raise


class TracedGeneration:
    """Its span ends when it is left, whether it was read to its end or not."""

    def __init__(self, generation: Generation, span: Span) -> None:
        self._generation = generation
        self._span = span
        self._began = time.perf_counter()
        self._first = True
        self._reasons: dict[int, str] = {}

    @property
    def usage(self) -> Usage:
        return self._generation.usage

    def __aiter__(self) -> TracedGeneration:
        return self

    async def __anext__(self) -> ChoiceDelta:
        try:
            delta = await anext(self._generation)
        except ServerError as error:
            _fail(self._span, error)
            raise
        if self._first:
            self._first = False
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", time.perf_counter() - self._began)
        if delta.finish_reason is not None:
            self._reasons[delta.index] = delta.finish_reason.value
        return delta

    async def aclose(self) -> None:
        await self._generation.aclose()
        if self._span.is_recording():
            usage = self._generation.usage
            reasons = [self._reasons.get(index, "abort") for index in range(max(self._reasons, default=0) + 1)]
            self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
            self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
            self._span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
            self._span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
            self._span.end()


def _fail(span: Span, error: ServerError) -> None:
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(StatusCode.ERROR)
