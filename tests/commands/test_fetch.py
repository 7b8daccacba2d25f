"""`gpt2-server fetch` against a hub of our own: one commit, digests held and recorded, resumed, and never a pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import subprocess
import sys
import termios
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "somebody/tiny"


class Hub(ThreadingHTTPServer):
    """One repository, in the little of the Hub's protocol that its client needs."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = files
        self.lies: set[str] = set()  # files whose stated digest is another's
        self.cuts: dict[str, int] = {}  # bytes after which the connection is cut, once
        self.ranges: list[str] = []  # ranges that were asked for
        self.asked: list[str] = []  # revisions
        self.pull_requests: dict[str, dict[str, bytes]] = {}  # their files, by refs/pr/N
        self.portal = False  # a network that answers everything with a page to log in to


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.server.portal:
            self._send(200, b"<html>Log in</html>", {"content-type": "text/html"}, body=body)
        elif path == f"/api/models/{REPO}/refs":
            refs = [{"name": ref, "ref": ref, "targetCommit": COMMIT} for ref in self.server.pull_requests]
            found = {"branches": [], "converts": [], "tags": [], "pullRequests": refs}
            self._send(200, json.dumps(found).encode(), {"content-type": "application/json"})
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            revision = urllib.parse.unquote(path.removeprefix(f"/api/models/{REPO}/tree/"))
            files = self.server.pull_requests.get(revision, self.server.files)
            self._send(200, json.dumps(self._tree(files)).encode(), {"content-type": "application/json"})
        elif path.startswith(f"/api/models/{REPO}"):
            self.server.asked.append(path.partition("/revision/")[2])
            self._send(200, json.dumps(self._info()).encode(), {"content-type": "application/json"})
        elif path.startswith(f"/{REPO}/resolve/"):
            revision, _, name = path.removeprefix(f"/{REPO}/resolve/").partition("/")
            self.server.asked.append(revision)
            self._file(name, body=body)
        else:
            self._send(404, b"", {"x-error-code": "RepoNotFound"})

    def _info(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.server.files.items():
            shown = content + b"!" if name in self.server.lies else content
            file: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git(shown)}
            if name.endswith((".safetensors", ".bin")):
                file["lfs"] = {"sha256": sha256(shown), "size": len(content), "pointerSize": 134}
            siblings.append(file)
        return {"id": REPO, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False, "downloads": 0}

    def _tree(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": git(content)} for name, content in files.items()
        ]

    def _file(self, name: str, *, body: bool) -> None:
        content = self.server.files.get(name)
        if content is None:
            self._send(404, b"", {"x-error-code": "EntryNotFound"})
            return
        headers = {"etag": f'"{sha256(content)}"', "x-repo-commit": COMMIT, "accept-ranges": "bytes"}
        status, at = 200, 0
        if wanted := self.headers.get("range"):
            self.server.ranges.append(f"{name} {wanted}")
            at = int(wanted.removeprefix("bytes=").partition("-")[0])
            status = 206
            headers["content-range"] = f"bytes {at}-{len(content) - 1}/{len(content)}"
        part = content[at:]
        cut = self.server.cuts.pop(name, None) if body else None
        self._send(status, part, headers, body=body, cut=cut)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    files |= {"pytorch_model.bin": b"\x80\x02", "README.md": b"#", "onnx/model.safetensors": b"x"}
    server = Hub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Any:
    def run(*arguments: str, command: str = "fetch") -> subprocess.CompletedProcess[str]:
        env = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        line = [sys.executable, "-m", "server.cli", command, *arguments]
        ours, theirs = pty.openpty()  # a terminal, for which there are progress bars
        termios.tcsetwinsize(theirs, (24, 100))
        os.set_blocking(ours, False)
        try:
            done = subprocess.run(
                line, env=env, stdout=subprocess.PIPE, stderr=theirs, text=True, check=False, timeout=120
            )
            with contextlib.suppress(BlockingIOError):
                done.stderr = os.read(ours, 1 << 20).decode()
        finally:
            os.close(ours)
            os.close(theirs)
        done.stderr = done.stderr or ""
        return done

    return run


def test_it_brings_one_commit_and_records_its_digests(fetch: Any, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    there = tmp_path / "model"
    done = fetch(REPO, "--revision", "v1", "--to", str(there))
    assert done.returncode == 0, done.stderr
    assert hub.asked[0] == "v1"
    assert set(hub.asked[1:]) == {COMMIT}, "a branch may have moved on meanwhile"
    names = {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    assert {path.name for path in there.iterdir() if path.is_file()} == names | {"SHA256SUMS"}
    assert all((there / name).read_bytes() == (tiny / name).read_bytes() for name in names)
    head, *lines = (there / "SHA256SUMS").read_text().splitlines()
    assert head == f"# {REPO} {COMMIT}"
    assert sorted(lines) == sorted(f"{sha256((tiny / name).read_bytes())}  {name}" for name in names)
    assert "100%" in done.stderr, "a progress bar"
    assert f"gpt2-server serve {there}" in done.stdout
    checked = fetch(str(there), command="check")
    assert checked.returncode == 0, checked.stderr
    assert "4 files are those of SHA256SUMS" in checked.stdout
    config = there / "config.json"
    config.write_text(config.read_text() + "\n")
    assert "config.json is not the file that was fetched" in fetch(str(there), command="check").stderr


def test_what_was_cut_off_goes_on_where_it_was(fetch: Any, hub: Hub, tiny: Path) -> None:
    """Into the Hub's cache, from which it is then served by its name."""
    hub.cuts["model.safetensors"] = 11 << 20  # the Hub's client writes in pieces of 10 MiB
    done = fetch(REPO)
    again = done if done.returncode == 0 else fetch(REPO)
    assert again.returncode == 0, again.stderr
    assert hub.ranges == [f"model.safetensors bytes={10 << 20}-"]
    assert f"gpt2-server serve {REPO} --revision {COMMIT}" in again.stdout
    checked = fetch(REPO, "--revision", COMMIT, command="check")
    assert checked.returncode == 0, checked.stderr
    assert COMMIT in checked.stdout


def test_a_file_that_is_not_what_the_hub_states_is_removed(fetch: Any, hub: Hub, tmp_path: Path) -> None:
    for name in ("model.safetensors", "merges.txt"):
        hub.lies = {name}
        done = fetch(REPO, "--to", str(tmp_path / "model"))
        assert done.returncode == 78
        assert f"{name} is not what the Hub states" in done.stderr
        assert not (tmp_path / "model" / name).exists()
        assert not (tmp_path / "model" / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model.safetensors": None}, "pickled weights alone, which can execute code"),
        ({"model.safetensors": None, "pytorch_model.bin": None}, "no safetensors weights"),
        ({"config.json": None}, "has no config.json"),
        ({"config.json": b'{"model_type": "llama"}'}, "llama"),
    ],
)
def test_what_cannot_be_served_is_not_fetched(
    change: dict[str, bytes | None], line: str, fetch: Any, hub: Hub, tmp_path: Path
) -> None:
    hub.files = {name: content for name, content in (hub.files | change).items() if content is not None}
    done = fetch(REPO, "--to", str(tmp_path / "model"))
    assert done.returncode == 78
    assert line in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert not (tmp_path / "model" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("command", ["fetch", "check"])
@pytest.mark.parametrize("how", ["nobody listens", "a portal answers"])
def test_without_a_network_one_line_says_so(how: str, command: str, fetch: Any, hub: Hub) -> None:
    if how == "nobody listens":
        hub.server_close()
    else:
        hub.portal = True
    done = fetch(REPO, command=command)
    assert done.returncode == 78
    assert "the Hugging Face Hub did not give" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_such_model(fetch: Any) -> None:
    done = fetch("nobody/nothing")
    assert done.returncode == 78
    assert "did not give" in done.stderr
    assert "Traceback" not in done.stderr


def pickled(hub: Hub, tiny: Path, directory: Path) -> None:
    """Leaves the repository with pickled weights alone."""
    tensors = load_file(tiny / "model.safetensors")
    torch.save({f"transformer.{name}": tensor for name, tensor in tensors.items()}, directory / "pickled")
    hub.files["pytorch_model.bin"] = (directory / "pickled").read_bytes()
    del hub.files["model.safetensors"]


def test_pickled_weights_are_converted_when_that_is_asked_for(fetch: Any, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    pickled(hub, tiny, tmp_path)
    made = tmp_path / "made"
    done = fetch(REPO, "--convert", "--to", str(made))
    assert done.returncode == 0, done.stderr
    assert f"gpt2-server serve {made}" in done.stdout
    stored, expected = load_file(made / "model.safetensors"), load_file(tiny / "model.safetensors")
    assert all(torch.equal(stored[f"transformer.{name}"], expected[name]) for name in expected)
    assert (made / "vocab.json").read_bytes() == (tiny / "vocab.json").read_bytes()
    assert not list(made.glob("*.bin"))
    digests = json.loads((made / "SOURCE.json").read_text())["sha256"]
    assert digests == {"pytorch_model.bin": sha256(hub.files["pytorch_model.bin"])}


@pytest.mark.parametrize("command", ["fetch", "check"])
def test_pickled_weights_are_answered_with_what_to_type(
    command: str, fetch: Any, hub: Hub, tiny: Path, tmp_path: Path
) -> None:
    pickled(hub, tiny, tmp_path)
    hub.pull_requests = {"refs/pr/1": {"README.md": b"#"}, "refs/pr/3": {"model.safetensors": b"x"}}
    done = fetch(REPO, command=command)
    assert done.returncode == 78
    assert f"{REPO} has pickled weights alone, which can execute code" in done.stderr
    assert "--revision refs/pr/3" in done.stderr
    assert f"gpt2-server fetch {REPO} --convert" in done.stderr
    assert not list((tmp_path / "hf").rglob("pytorch_model.bin"))


def test_checkpoints_of_a_training_run_are_left_where_they_are(fetch: Any, hub: Hub, tmp_path: Path) -> None:
    """As the Trainer uploads them, in directories of their own."""
    for name in ("model.safetensors", "tokenizer.json", "optimizer.pt"):
        hub.files[f"checkpoint-500/{name}"] = b"large"
    for command in ("fetch", "check"):
        done = fetch(REPO, command=command)
        assert done.returncode == 0, done.stderr
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.name in ("checkpoint-500", "onnx")]
