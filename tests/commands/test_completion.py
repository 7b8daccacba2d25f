"""`gpt2-server completion`: the scripts name every command and flag, and the shells that are here read them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from server.cli import main
from server.commands import COMMANDS


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def test_bash_completes_commands_flags_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    text = script("bash", capsys)

    def complete(*words: str) -> set[str]:
        line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _gpt2_server; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", f"{text}\n{line}"], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert complete("gpt2-server", "''") == set(COMMANDS)
    assert complete("gpt2-server", "he") == {"healthcheck"}
    assert complete("gpt2-server", "serve", "--max-num-s") == {"--max-num-seqs"}
    assert "pyproject.toml" in complete("gpt2-server", "serve", "pyp")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_reads_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert all(name in text for name in COMMANDS)
    assert "max-num-seqs" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=text, text=True, check=True)
