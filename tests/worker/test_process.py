"""The worker process by itself, over its socket."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from model.sampling_params import SamplingParams
from server.worker.messages import (
    FromWorker,
    Ready,
    Received,
    Refused,
    Sample,
    Shutdown,
    Start,
    Starting,
    Step,
    Submit,
    ToWorker,
)


@pytest.fixture
def worker(tiny: Path) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "server.worker", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    theirs.close()
    ours.settimeout(120)
    start = Start(
        model=str(tiny),
        eos_token_ids=[50256],
        device="cpu",
        dtype="float32",
        quantization=None,
        kv_cache_dtype="auto",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        target_itl=None,
        block_size=16,
        kv_cache_bytes=1 << 20,
        gpu_utilization=None,
        deterministic=False,
        prefix_caching=True,
        kernels="auto",
        threads=1,
    )
    with process:
        with ours:
            tell(ours, start)
            while isinstance(message := hear(ours), Starting):
                pass
            assert isinstance(message, Ready)
            yield ours, process
        assert process.wait(60) == 0


def tell(sock: socket.socket, *messages: ToWorker) -> None:
    frames = [msgspec.msgpack.encode(message) for message in messages]
    sock.sendall(b"".join(struct.pack("<I", len(frame)) + frame for frame in frames))


def hear(sock: socket.socket) -> FromWorker:
    (length,) = struct.unpack("<I", sock.recv(4, socket.MSG_WAITALL))
    message: FromWorker = msgspec.msgpack.decode(sock.recv(length, socket.MSG_WAITALL), type=FromWorker)
    return message


def test_a_sequence_that_can_never_run_is_refused_and_the_others_go_on(
    worker: tuple[socket.socket, subprocess.Popen[bytes]],
) -> None:
    sock, process = worker
    params = SamplingParams(seed=1, max_tokens=3, ignore_eos=True)
    prompts = [[5, 6], [5] * 64, [], [7, 8]]
    tell(sock, Submit(params, prompts, [Sample(place + 1, place) for place in range(4)]))
    outputs: dict[int, int] = {}
    refused = []
    while len(outputs) < 2 or min(outputs.values()) < 3:
        message = hear(sock)
        if isinstance(message, Refused):
            refused.append(message.id)
        elif not isinstance(message, Received):
            assert isinstance(message, Step)
            for said in message.outputs:
                outputs[said.id] = outputs.get(said.id, 0) + (said.token is not None)
    assert refused == [2, 3]
    assert outputs == {1: 3, 4: 3}
    assert message.received == 2  # Start and Submit
    for number in (signal.SIGINT, signal.SIGTERM):  # to end is for the api process to say
        os.kill(process.pid, number)
    tell(sock, Submit(params, [[9]], [Sample(5, 0)]))
    assert hear(sock) == Received(3)  # before it works on it
    assert isinstance(hear(sock), Step)
    tell(sock, Shutdown())


def test_it_ends_when_nobody_is_at_the_other_end(worker: tuple[socket.socket, subprocess.Popen[bytes]]) -> None:
    sock, process = worker
    sock.close()
    assert process.wait(60) == 0
