"""schemathesis against our own OpenAPI document, every check on: what the document says is what the server does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from outside import Environment
from serving import RunningServer, serving

CONFIG = Path(__file__).parent / "schemathesis.toml"


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    template = tmp_path_factory.mktemp("chat") / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    brief = ("--max-model-len", "128")  # a chat answer is as long as the context
    with serving(tiny, "--threads", "1", "--chat-template", str(template), *brief) as running:
        yield running


def fuzz(server: RunningServer, environment: Environment, where: Path, *options: str) -> None:
    python = environment("schemathesis", "schemathesis==4.32.5")
    program = [python.parent / "schemathesis", f"--config-file={CONFIG}", "run", f"{server.url}/openapi.json"]
    common = [
        "--checks",
        "all",
        "--continue-on-failure",
        "--no-color",
        "--warnings",
        "off",
        "--suppress-health-check",
        "all",
    ]
    awake = ["--exclude-path-regex", "^/(sleep|wake_up)$"]  # asleep it refuses everything, as tests/service says
    result = subprocess.run(
        [*program, *common, *awake, *options], cwd=where, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    failed = [name for name in server.metrics() if name.startswith("gpt2_http_requests") and 'status="5' in name]
    assert not failed


def test_the_document_is_what_the_server_does(server: RunningServer, environment: Environment, tmp_path: Path) -> None:
    fuzz(server, environment, tmp_path, "--phases", "fuzzing", "--max-examples", "12", "--generation-deterministic")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_document_at_length(server: RunningServer, environment: Environment, tmp_path: Path) -> None:
    fuzz(server, environment, tmp_path, "--max-examples", "200")


def test_every_field_has_a_default_or_is_required(server: RunningServer) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path, methods in document["paths"].items():
        body = methods.get("post", {}).get("requestBody")
        if body is None:
            continue
        schema = body["content"]["application/json"]["schema"]
        for name, field in schema["properties"].items():
            nullable = {"type": "null"} in field.get("anyOf", ())  # a default of null is not written
            optional = nullable or "default" in field
            assert optional or name in schema["required"], f"{path}: {name} has no default"
