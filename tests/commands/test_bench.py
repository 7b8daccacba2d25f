"""`gpt2-server bench`: a table of what a server did under a load, and one line where there is none."""

from __future__ import annotations

import pytest
from serving import RunningServer

from server.cli import main


def test_it_loads_a_server_and_says_how_fast_it_is(idle: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    before = idle.metrics()["gpt2_generation_tokens_total"]
    flags = ["--concurrency", "1,4", "--prompt-tokens", "20", "--max-tokens", "8", "--requests", "4"]
    assert main(["bench", idle.url, *flags]) == 0
    _, _, head, one, four = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "streams"
    for line, streams in ((one, "1"), (four, "4")):
        cells = line.split()
        assert cells[0] == streams
        assert float(cells[1].replace(",", "")) > 0
        assert cells[-1] == "0", "requests failed"
    assert idle.metrics()["gpt2_generation_tokens_total"] - before == (1 + 4 + 4) * 8


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["http://127.0.0.1:1"], "every request failed"),
        (["ftp://127.0.0.1"], "not an http URL"),
        (["--concurrency", "some"], "whole numbers"),
        (["--concurrency", "0"], "1 at least"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 78
    assert line in capsys.readouterr().err
