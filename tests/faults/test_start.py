"""A server that cannot serve says why in one line and exits 78; one that is asked to leave leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import RunningServer, check_refused, serving, start


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def disguise_a_pickle(directory: Path) -> None:
    torch.save({"a": torch.zeros(2)}, directory / "model.safetensors")


def only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def no_vocabulary(directory: Path) -> None:
    (directory / "merges.txt").unlink()


def another_shape(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"n_layer": 2', '"n_layer": 3'))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (truncate, "model.safetensors is damaged"),
        (disguise_a_pickle, "model.safetensors is damaged or no safetensors file"),
        (only_a_pickle, "pickled, which can execute code; make of it what is served: gpt2-server convert"),
        (no_config, "cannot read config.json"),
        (no_vocabulary, "neither vocab.json and merges.txt nor tokenizer.json"),
        (another_shape, "the checkpoint lacks h.2."),
    ],
)
def test_a_checkpoint_that_cannot_be_served(damage: Callable[[Path], None], line: str, checkpoint: Path) -> None:
    damage(checkpoint)
    check_refused(start(checkpoint), line)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--device", "cuda:99"], "device cuda:99"),
        (["--dtype", "bfloat16", "--device", "cpu"], "dtype bfloat16 runs on a GPU"),
        (
            ["--quantization", "int8", "--device", "cpu", "--kernels", "off"],
            "int8 weights need the C kernels",
        ),
        (["--quantization", "int4"], "setting quantization: input should be 'int8'"),
        (["--kv-cache-dtype", "bfloat16", "--device", "cpu"], "a KV cache of bfloat16 does not go with"),
        (["--max-model-len", "2048"], "max_model_len 2048 is more than the model's 1024 positions"),
        (["--max-num-seqs", "0"], "setting max_num_seqs: input should be greater than or equal to 1"),
        (["--device", "tpu"], "setting device: string should match pattern"),
        (["--config", "/no/such/file"], "cannot read the config file: No such file"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7:0"),
    ],
)
def test_settings_that_cannot_be(flags: list[str], line: str, tiny: Path) -> None:
    check_refused(start(tiny, *flags), line)


def test_an_adapter_is_told_what_to_type(tmp_path: Path) -> None:
    adapter = tmp_path / "mine"
    adapter.mkdir()
    described = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "owner/gpt2"}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    typed = f"gpt2-server serve owner/gpt2 --lora-modules mine={adapter}"
    check_refused(
        start(adapter), f"is a LoRA adapter and no model; serve its model with the adapter beside it: {typed}"
    )


@pytest.mark.parametrize(
    ("module", "line"),
    [("x=nosuch", "lora_modules: 'x': 'nosuch' is no directory"), ("nosuch", "'nosuch' is not name=directory")],
)
def test_a_module_that_is_no_directory_is_named(module: str, line: str, tiny: Path) -> None:
    check_refused(start(tiny, "--lora-modules", module), line)


def test_a_sighup_while_it_starts_waits_until_it_has(tiny: Path, tmp_path: Path) -> None:
    """The key file is a FIFO, at which the start waits until the keys are written."""
    keys = tmp_path / "keys"
    os.mkfifo(keys, 0o600)
    later = tmp_path / "later"
    later.write_text("me: sk-second\n")
    process = start(tiny, "--api-key-file", str(keys), "--threads", "1")
    with process, keys.open("w") as file:
        later.replace(keys)
        process.send_signal(signal.SIGHUP)
        file.write("me: sk-first\n")
        file.close()
        assert process.stdout is not None
        url = next(line for line in process.stdout if "Serving on" in line).split()[2].rstrip(",")
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer sk-second"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_the_printed_url_of_an_ipv6_address_can_be_asked(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", "--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert any(f"curl {server.url}/v1/completions" in line for line in server.lines)


def test_an_unknown_setting_in_the_environment(tiny: Path) -> None:
    check_refused(start(tiny, env={"GPT2_SERVER_PROT": "1"}), "GPT2_SERVER_PROT is no setting of this server")


def test_a_port_that_is_taken(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check_refused(start(tiny, "--port", str(taken.getsockname()[1])), "cannot listen on 127.0.0.1:")


def test_command_line_over_environment_over_file(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('served_model_name = ["from-file"]\nmax_logprobs = 2\nmax_choices = 2\n')
    env = {"GPT2_SERVER_MAX_LOGPROBS": "3", "GPT2_SERVER_MAX_CHOICES": "3"}
    with serving(tiny, "--config", str(file), "--max-logprobs", "5", "--threads", "1", env=env) as server:
        assert server.complete(prompt="a", max_tokens=1, logprobs=5)["model"] == "from-file"
        assert server.complete(prompt="a", max_tokens=1, n=3)
        over = {"prompt": "a", "max_tokens": 1, "n": 4}
        assert httpx.post(f"{server.url}/v1/completions", json=over).status_code == 400


def test_a_key_from_the_environment_is_asked_for(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", env={"GPT2_SERVER_API_KEY": "sk-right"}) as server:
        url = f"{server.url}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"authorization": "Bearer sk-wrong"}).status_code == 401
        assert httpx.get(url, headers={"authorization": "Bearer sk-right"}).status_code == 200
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert not any("sk-" in line for line in server.lines)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_leaves_when_asked(number: signal.Signals, tiny: Path) -> None:
    with serving(tiny, "--threads", "1") as server:
        assert server.stop(number) == 0


def test_running_requests_finish_before_it_leaves(tiny: Path) -> None:
    with serving(tiny, "--threads", "1") as server:
        body = {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True, "seed": 1}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 300
        assert server.process.wait(20) == 0


def test_a_killed_worker_costs_no_stream_a_byte(tiny: Path) -> None:
    with serving(tiny, "--threads", "1") as server:
        for request in (
            {"prompt": "a b c", "max_tokens": 300, "seed": 4, "ignore_eos": True, "logprobs": 2},
            {"prompt": "a b c", "max_tokens": 300, "temperature": 0, "n": 2, "echo": True},
        ):
            undisturbed = server.complete(**request)["choices"]
            text = ["" for _ in undisturbed]
            chunks = kill_midway(server, request)
            assert len(chunks) > 100
            for choice in (choice for chunk in chunks for choice in chunk["choices"]):
                text[choice["index"]] += choice["text"]
            assert text == [choice["text"] for choice in undisturbed]
        assert server.metrics()["gpt2_worker_restarts_total"] == 2


def kill_midway(server: RunningServer, request: dict[str, Any]) -> list[dict[str, Any]]:
    body = {**request, "stream": True}
    chunks = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
                if len(chunks) == 50:
                    os.kill(server.worker_pid, signal.SIGKILL)
    return chunks


def test_the_api_process_imports_nothing_that_is_large_and_not_needed() -> None:
    large = {"torch", "numpy", "transformers", "sqlalchemy", "llguidance"}
    script = "import sys, server.commands.serve; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert "server.assembly" in modules
    assert not large & set(modules)


def test_without_the_kernels_pytorch_serves_the_same_text(tiny: Path) -> None:
    request = {"prompt": "The sea", "max_tokens": 60, "seed": 3, "n": 2, "ignore_eos": True}
    texts = []
    for choice, word in (("off", "PyTorch"), ("portable", "C kernels (portable)")):
        with serving(tiny, "--threads", "1", "--kernels", choice) as server:
            assert any(word in line for line in server.lines if " on cpu" in line)
            texts.append([each["text"] for each in server.complete(**request)["choices"]])
    assert texts[0] == texts[1]
