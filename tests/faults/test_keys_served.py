"""Keys in a whole server: several of them, read again while it runs, and nowhere to be seen."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import psutil
from serving import RunningServer, check_refused, serving, start


def ask(server: RunningServer, key: str | None, path: str = "/v1/models") -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.get(f"{server.url}{path}", headers=headers).status_code


def complete(server: RunningServer, key: str, prompt: str) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-api-key": key}, timeout=60)


def wait_for(server: RunningServer, words: str) -> None:
    deadline = time.monotonic() + 10
    while not any(words in line for line in server.lines):
        assert time.monotonic() < deadline, server.lines
        time.sleep(0.02)


def test_several_keys_their_names_and_a_change_of_keys(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text("alice: sk-first-secret\nbob: sk-second-secret\n")
    flags = ("--api-key-file", str(file), "--open-paths", "/metrics", "--max-tokens-per-minute", "60")
    with serving(tiny, "--threads", "1", *flags, env={"GPT2_SERVER_API_KEY": "sk-zeroth-secret"}) as server:
        keys = ["sk-zeroth-secret", "sk-first-secret", "sk-second-secret"]
        assert [ask(server, key) for key in (*keys, "sk-third-secret", None)] == [200, 200, 200, 401, 401]
        assert [ask(server, None, path) for path in ("/metrics", "/openapi.json", "/version")] == [200, 401, 401]

        long = "a b c d e f g h " * 8
        assert complete(server, "sk-first-secret", long).status_code == 200
        again = [complete(server, key, long).status_code for key in ("sk-first-secret", "sk-second-secret")]
        assert again == [429, 200], "a quota is of one name"
        metrics = server.metrics()
        assert metrics['gpt2_key_requests_total{key="alice"}'] == metrics['gpt2_key_requests_total{key="bob"}'] == 1
        assert metrics['gpt2_key_tokens_total{key="alice",kind="generation"}'] == 2
        assert metrics["gpt2_prefix_cache_hits_total"] == 0, "a cache is of one name"

        file.write_text("alice: not two words\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for(server, "line 1 is not `name: key`")
        assert ask(server, "sk-first-secret") == 200
        file.write_text("carol: sk-third-secret\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for(server, '"message": "keys read again", "keys": 2')
        assert [ask(server, key) for key in (*keys, "sk-third-secret")] == [200, 401, 401, 200]

        family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        assert not any("secret" in " ".join(process.cmdline()) for process in family)
        assert not any("secret" in " ".join(process.environ().values()) for process in family[1:])
        assert not any("secret" in line for line in server.lines)


def test_a_file_without_keys_opens_nothing(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch(0o600)
    check_refused(start(tiny, "--api-key-file", str(file)), "the key file holds no key")


def test_only_what_is_no_work_can_be_opened(tiny: Path) -> None:
    check_refused(start(tiny, "--open-paths", "/v1/completions"), "setting open_paths.0: input should be '/metrics'")
