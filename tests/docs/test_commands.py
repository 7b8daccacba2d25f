"""Every command that a page shows is run in a copy of the repository, or says why not; CONTRIBUTING.md has the rule.

`127.0.0.1:8000` is one server of the default model, with a data directory, that all blocks share; one that a block
starts ends when ready.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from blocks import CONSOLE, PYTHON, REASONS, ROOT, SHELL, Block, read_blocks
from outside import Environment, environment
from serving import RunningServer, serving

from server.cli import make_parser
from server.commands import COMMANDS

__all__ = ["environment"]

BLOCKS = read_blocks()
RUN = [block for block in BLOCKS if block.language in SHELL + CONSOLE + PYTHON and block.reason is None]
TIMEOUT = 180  # seconds: a block takes a few, and a busy machine many more
READY_TIMEOUT = 30


def name(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    data = tmp_path_factory.mktemp("data")
    with serving(None, "--threads", "1", "--data-dir", str(data)) as running:
        yield running


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a newcomer has after `make dev`, but for `gpt2-server serve`, which does not stay."""
    copy = tmp_path_factory.mktemp("clone") / "gpt2-server"
    shutil.copytree(ROOT, copy, ignore=lambda _, names: {n for n in names if n[0] == "." and n != ".ci"})
    venv = copy / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "lib").symlink_to(Path(sys.prefix) / "lib")
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", venv)
    for program in (Path(sys.prefix) / "bin").iterdir():
        (venv / "bin" / program.name).symlink_to(program)
    stand_in = venv / "bin" / "gpt2-server"
    stand_in.unlink(missing_ok=True)
    stand_in.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} tests/docs/serve_once.py "$@"\n')
    stand_in.chmod(0o755)
    for done in (".installed", ".dev"):
        (venv / done).touch()
    return copy


def test_there_are_blocks_to_run() -> None:
    assert len(RUN) >= 4
    assert {"README.md"} <= {block.page for block in RUN}


@pytest.mark.parametrize("block", BLOCKS, ids=name)
def test_a_block_names_its_language_and_its_mark_is_true(block: Block) -> None:
    assert block.language, "say ```sh, ```python, ```console, or ```text for what nobody runs"
    if block.reason is not None:
        assert block.reason in REASONS, f"no such reason; there are: {', '.join(REASONS)}"
        assert re.search(REASONS[block.reason], block.text), f"nothing in it {block.reason}"
    if block.requirement is not None:
        assert block.language in PYTHON
        assert re.fullmatch(r"[\w-]+==[\w.]+", block.requirement)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.commands], ids=name)
def test_what_it_calls_exists(block: Block) -> None:
    """Those that are not run too."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for arguments in block.calls("gpt2-server"):
        assert arguments
        assert arguments[0] in COMMANDS or arguments[0].startswith("-")
        if not {"-h", "--help", "--version"} & set(arguments):
            make_parser(arguments[:1]).parse_args(arguments)
    for arguments in block.calls("make"):
        assert {word for word in arguments if "=" not in word} <= targets
    for program in ("python", "python3"):
        for arguments in block.calls(program):
            if arguments[:1] == ["-m"] and arguments[1].partition(".")[0] in {"server", "model", "benchmarks"}:
                assert importlib.util.find_spec(arguments[1])
            elif arguments and arguments[0].endswith(".py"):
                assert (ROOT / arguments[0]).is_file()


@pytest.mark.parametrize("block", RUN, ids=name)
def test_a_block_runs(block: Block, clone: Path, server: RunningServer, environment: Environment) -> None:
    text = re.sub(r"(127\.0\.0\.1|localhost):8000", server.url.removeprefix("http://"), block.commands or block.text)
    if block.commands:
        command = ["bash", "-euo", "pipefail", "-c", text]
    elif block.requirement is not None:
        command = [str(environment(block.requirement.replace("==", "-"), block.requirement)), "-c", text]
    else:
        command = [sys.executable, "-c", text]
    env = {
        **os.environ, "PYTHONPATH": "" if block.requirement else str(clone), "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1",
        "PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}", "GPT2_SERVER_THREADS": "1",
        "GPT2_SERVER_PORT": server.url.rpartition(":")[2],
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=clone, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "Traceback" not in done.stderr
    assert '"error"' not in done.stdout, "a request was refused"
    deadline = time.monotonic() + READY_TIMEOUT
    while httpx.get(f"{server.url}/ready").status_code != 200:
        assert time.monotonic() < deadline, "leave the server as you found it"
        time.sleep(0.1)
