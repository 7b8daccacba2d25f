"""Spans as a collector gets them: the caller's trace goes on, the inference says what it used, and nothing is told."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import serving, start

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


class Collector(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = trace_service.ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
        self.server.received.append(request)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.received = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    found = getattr(any_value, kind)
    return [value(each) for each in found.values] if kind == "array_value" else found


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: value(each.value) for each in span.attributes}


def test_a_collector_gets_spans_of_requests(collector: ThreadingHTTPServer, tiny: Path) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_address[1]}"}
    with serving(tiny, "--threads", "1", "--served-model-name", "traced", env=env) as server:
        body = {"prompt": "a secret text", "max_tokens": 7, "n": 2, "temperature": 0.5, "seed": 1, "ignore_eos": True}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        list(server.stream(prompt="another", max_tokens=3))
        assert httpx.post(f"{server.url}/v1/completions", json={**body, "n": 0}).status_code == 400
    requests = collector.received  # type: ignore[attr-defined]
    assert requests, "spans are sent before it leaves"
    spans = [span for r in requests for each in r.resource_spans for s in each.scope_spans for span in s.spans]
    resource = {each.key: value(each.value) for each in requests[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "gpt2-server"
    http = next(span for span in spans if span.trace_id.hex() == TRACE and span.name == "POST /v1/completions")
    assert http.parent_span_id.hex() == PARENT
    assert attributes(http)["http.response.status_code"] == 200
    inference = next(span for span in spans if span.parent_span_id == http.span_id)
    assert inference.name == "text_completion traced"
    said = attributes(inference)
    assert 0 < said.pop("gen_ai.response.time_to_first_chunk") < 60
    assert said.pop("gen_ai.response.id").startswith("cmpl-")
    assert said == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "gpt2-server",
        "gen_ai.request.model": "traced",
        "gen_ai.response.model": "traced",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 14,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    streamed = [span for span in spans if attributes(span).get("gen_ai.usage.output_tokens") == 3]
    assert len(streamed) == 1
    assert streamed[0].trace_id.hex() != TRACE, "one that brings no trace begins one"
    refused = next(span for span in spans if attributes(span).get("http.response.status_code") == 400)
    assert not [span for span in spans if span.parent_span_id == refused.span_id]
    assert b"secret" not in b"".join(request.SerializeToString() for request in requests)


def test_it_costs_nothing_unless_it_is_asked_for(tiny: Path) -> None:
    quiet = {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    for env in ({}, quiet):
        with serving(tiny, "--threads", "1", env=env) as server:
            maps = Path(f"/proc/{server.process.pid}/maps").read_text()
            assert "google/_upb" not in maps, "protobuf is loaded"


def test_without_the_extra_it_says_so(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['opentelemetry.exporter'] = None")
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    }
    process = start(tiny, env=env)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 78
    assert "pip install 'gpt2-server[otel]'" in out
