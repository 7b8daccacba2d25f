"""What a worker says before it is ready."""

from __future__ import annotations

import socket

from server.worker.__main__ import Teller
from server.worker.channel import WorkerChannel
from server.worker.messages import Starting


class Overheard(WorkerChannel):
    def __init__(self) -> None:
        self._ends = socket.socketpair()
        super().__init__(self._ends[0])
        self.said: list[object] = []

    def send(self, message: object) -> None:
        self.said.append(message)

    def close(self) -> None:
        for end in self._ends:
            end.close()


def test_a_start_is_told_in_hundredths_and_graph_by_graph() -> None:
    channel = Overheard()
    try:
        teller = Teller(channel)
        for share in (0.001, 0.5, 0.501, 0.509, 0.51, 1.0):
            teller.read(share)
        assert teller.graphs == ""
        for done in (1, 2):
            teller.recorded(done, 21, 0.5 * done)
    finally:
        channel.close()
    graphs = [Starting(1.0, 1, 21, 0.5), Starting(1.0, 2, 21, 1.0)]
    assert channel.said == [Starting(0.5), Starting(0.51), Starting(1.0), *graphs]
    assert teller.graphs == ", 2 CUDA graphs recorded in 1.0 s"
