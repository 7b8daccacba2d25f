"""A newcomer's first minutes, from nothing: clone, `make serve`, the README's curl, the page. Installs everything."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="this is no git checkout")
def test_a_fresh_clone_serves(tmp_path: Path) -> None:
    clone = tmp_path / "gpt2-server"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    env |= {"GPT2_SERVER_PORT": "0", "GPT2_SERVER_THREADS": "1"}
    with subprocess.Popen(["make", "serve"], cwd=clone, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            url = next(found[1] for line in lines if (found := re.search(r"Serving on (http://\S+),", line)))
            readme = (clone / "README.md").read_text("utf-8")
            shown = re.search(r"^\$ (curl .*)\n(\{.*\})$", readme, re.MULTILINE)
            assert shown is not None
            command = shown[1].replace("http://127.0.0.1:8000", url)
            answer = subprocess.run(["sh", "-c", f"{command} -sS"], capture_output=True, check=True, timeout=120).stdout
            assert json.loads(answer)["choices"] == json.loads(shown[2])["choices"]
            assert "<html" in httpx.get(url).text
        finally:
            for child in psutil.Process(process.pid).children():
                child.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
