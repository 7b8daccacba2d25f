"""The worker's end of the socket."""

from __future__ import annotations

import select
import socket
import struct
import threading

import msgspec

from model.sampling_params import SamplingParams
from server.worker.channel import WorkerChannel
from server.worker.messages import Abort, Sample, Submit, ToWorker


def framed(message: ToWorker) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(payload)) + payload


def test_what_is_sent_after_a_long_message_arrives_with_it() -> None:
    """Not a piece of the long one before each step, with an Abort at the end of the queue."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = WorkerChannel(theirs)
        long = Submit(SamplingParams(seed=0), [list(range(1_000_000))], [Sample(1, 0)])
        sender = threading.Thread(target=ours.sendall, args=(framed(long) + framed(Abort([1])),))
        sender.start()
        select.select([theirs], [], [])
        steps = 0
        received: list[ToWorker] = []
        while not any(isinstance(message, Abort) for message in received):
            received += channel.receive(wait=False)
            steps += 1
        sender.join()
        assert isinstance(received[0], Submit)
        assert steps <= 2
