"""Adapters and fine-tuned models served by name, beside the model: one batch, and each says what it says alone."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import RunningServer, serving, start

from model.adapter_config import SITES, AdapterConfig
from model.training.checkpoint import export_weights, load_network
from model.training.lora import add_lora, export_lora, matrices_of
from server.checkpoint import EMBEDDED

NAMES = ["gpt2-server-default", "one", "two", "three", "four", "ft:gpt2:whole"]
PROMPT = "The harbour master wrote:"
TIGHT = {"GPT2_SERVER_LORA_MODULES_GIB": "0.0001"}  # of memory for those that are loaded


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four adapters, and a model with another head; all loud enough to be heard."""
    made = []
    for i, name in enumerate(NAMES[1:5]):
        network = load_network(EMBEDDED)
        config = AdapterConfig(rank=4, alpha=8.0, targets=SITES if i % 2 else SITES[:1], base="default")
        generator = torch.Generator().manual_seed(i)
        add_lora(network, config, generator)
        with torch.no_grad():
            for pair in matrices_of(network).values():
                pair.b.normal_(0.0, 0.15, generator=generator)
        directory = tmp_path_factory.mktemp(name)
        export_lora(network, config, directory)
        made.append(f"{name}={directory}")
    directory = tmp_path_factory.mktemp("whole")
    network = load_network(EMBEDDED)
    with torch.no_grad():
        network.transformer.ln_f.weight *= 0.5
    export_weights(network.state_dict(), network.config, directory, torch.float32)
    return [*made, f"{NAMES[5]}={directory}"]


@pytest.fixture(scope="module")
def server(modules: list[str]) -> Iterator[RunningServer]:
    with serving(None, "--threads", "1", "--lora-modules", *modules) as running:
        yield running


def body(name: str, **more: Any) -> dict[str, Any]:
    return {"model": name, "prompt": PROMPT, "max_tokens": 24, "seed": 5, "ignore_eos": True, "logprobs": 2, **more}


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


async def ask_together(url: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(timeout=120) as client:
        answers = await asyncio.gather(*[client.post(f"{url}/v1/completions", json=each) for each in bodies])
    return [answer.json() for answer in answers]


def test_a_mixed_batch_gives_each_the_bytes_it_has_alone(server: RunningServer) -> None:
    bodies = [body(name, seed=seed) for seed in (5, 6) for name in NAMES]
    alone = [server.complete(**each) for each in bodies]
    for _ in range(2):  # from the prefix cache, too
        together = asyncio.run(ask_together(server.url, bodies))
        assert [each["choices"] for each in together] == [each["choices"] for each in alone]
        assert [each["model"] for each in together] == NAMES * 2
    assert len({text(each) for each in alone}) == len(bodies)


def test_a_server_without_them_says_the_same(server: RunningServer) -> None:
    with serving(None, "--threads", "1") as plain:
        assert plain.complete(**body(NAMES[0]))["choices"] == server.complete(**body(NAMES[0]))["choices"]


def test_they_are_listed_and_their_fingerprints_differ(server: RunningServer) -> None:
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    found = {each["id"]: each for each in listed}
    assert set(NAMES) <= set(found)
    assert found["one"]["parent"] == NAMES[0]
    assert "/" not in found["one"]["root"]
    prints = {server.complete(**body(name, max_tokens=1))["system_fingerprint"] for name in NAMES}
    assert len(prints) == len(NAMES)
    assert httpx.get(f"{server.url}/v1/models/{NAMES[5]}").json()["id"] == NAMES[5]
    missing = httpx.post(f"{server.url}/v1/completions", json=body("five"))
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_embeddings_are_the_adapters_own(server: RunningServer) -> None:
    def embed(name: str) -> Any:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": name, "input": PROMPT})
        return answer.json()["data"][0]["embedding"]

    assert embed("one") != embed(NAMES[0]) != embed(NAMES[5])
    assert embed("one") == embed("one")


def test_streams_survive_the_death_of_the_worker(server: RunningServer) -> None:
    bodies = [body(name, max_tokens=200) for name in NAMES]
    alone = [text(server.complete(**each)) for each in bodies]

    async def ask() -> list[str]:
        asking = asyncio.create_task(ask_together(server.url, bodies))
        await asyncio.sleep(0.3)
        os.kill(server.worker_pid, signal.SIGKILL)
        return [text(each) for each in await asking]

    assert asyncio.run(ask()) == alone


@pytest.mark.slow
def test_guessing_changes_no_answer(server: RunningServer, modules: list[str]) -> None:
    bodies = [body(name, max_tokens=40) for name in NAMES]
    alone = [text(server.complete(**each)) for each in bodies]
    with serving(None, "--threads", "1", "--speculative-method", "ngram", "--lora-modules", *modules) as guessing:
        assert [text(each) for each in asyncio.run(ask_together(guessing.url, bodies))] == alone


def test_little_memory_is_enough(server: RunningServer, modules: list[str]) -> None:
    """Less than any two need: each request for another reads it again."""
    with serving(None, "--threads", "1", "--lora-modules", *modules, env=TIGHT) as tight:
        for name in [*NAMES, *NAMES]:
            assert text(tight.complete(**body(name))) == text(server.complete(**body(name)))


def test_they_are_there_again_after_a_sleep(server: RunningServer) -> None:
    before = [text(server.complete(**body(name))) for name in NAMES]
    for level in (1, 2):
        assert httpx.post(f"{server.url}/sleep", params={"level": level}, timeout=60).status_code == 200
        assert httpx.post(f"{server.url}/wake_up", timeout=60).status_code == 200
        assert [text(server.complete(**body(name))) for name in NAMES] == before


def test_files_that_have_gone_fail_one_request(modules: list[str], tmp_path: Path) -> None:
    name, _, source = modules[0].partition("=")
    kept = [f"{name}={tmp_path / 'a'}", modules[1]]
    (tmp_path / "a").mkdir()
    for file in Path(source).iterdir():
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    with serving(None, "--threads", "1", "--lora-modules", *kept, env=TIGHT) as server:
        server.complete(**body("two"))
        (tmp_path / "a" / "adapter_model.safetensors").unlink()
        answer = httpx.post(f"{server.url}/v1/completions", json=body("one"))
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "The engine can no longer read this model."
        assert text(server.complete(**body("two")))


def test_an_adapter_that_does_not_fit_stops_the_start(modules: list[str], tiny: Path) -> None:
    """It is read at the start, and no request is answered before."""
    process = start(tiny, "--lora-modules", modules[0])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 78
    assert re.search(r"one: the adapter has .base_model\.model\.transformer\.h\.\d", output)
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("one", "'one' is not name=directory"),
        ("one=/nowhere", "'one': '/nowhere' is no directory"),
        ("davinci={}", "'davinci' is a name of the model itself"),
        ("one={}", "one: cannot read config.json"),
    ],
)
def test_what_cannot_be_served_stops_the_start(tmp_path: Path, module: str, message: str) -> None:
    process = start(None, "--lora-modules", module.format(tmp_path))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 78
    assert message in output
