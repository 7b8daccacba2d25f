"""What a worker may be told while it sleeps."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
from test_process import hear, tell, worker

from model.sampling_params import SamplingParams
from server.worker.messages import (
    FromWorker,
    Load,
    Loaded,
    Received,
    Refused,
    Sample,
    Shutdown,
    Sleep,
    Slept,
    Step,
    Submit,
    Unload,
    WakeUp,
)

__all__ = ["worker"]


def hear_of(sock: socket.socket, kind: type[FromWorker]) -> FromWorker:
    while not isinstance(message := hear(sock), kind):
        assert isinstance(message, Step | Received)
    return message


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeping_worker_may_be_told_of_models_that_come_and_go(
    level: int, worker: tuple[socket.socket, subprocess.Popen[bytes]], tiny: Path
) -> None:
    """A job that ends, or a model that is deleted, may come between the look whether workers sleep and the message."""
    sock, _ = worker
    tell(sock, Load("one#1", str(tiny), lazy=True))
    assert hear_of(sock, Loaded) == Loaded("one#1")
    tell(sock, Sleep(level))
    hear_of(sock, Slept)
    tell(sock, Load("two#2", str(tiny), lazy=True), Unload("one#1"), Unload("never#3"))
    assert hear_of(sock, Loaded) == Loaded("two#2")
    tell(sock, WakeUp())
    assert hear_of(sock, Slept) == Slept(False)
    params = SamplingParams(seed=1, max_tokens=1, ignore_eos=True)
    tell(sock, Submit(params, [[5]], [Sample(1, 0)], variant="one#1"))
    assert hear_of(sock, Refused) == Refused(1, unloadable=True)
    tell(sock, Submit(params, [[5]], [Sample(2, 0)]))
    assert isinstance(hear_of(sock, Step), Step)
    tell(sock, Shutdown())
