"""Whether a worker that has something to do goes on doing it. Pure: no clock, no I/O, no process.

Silence is counted in looks, which the supervisor takes at an even pace, and not by the clock: on a machine so busy that
this process hardly runs, looks are late as well, and nobody is accused of what the machine did.
"""

from __future__ import annotations

from server.worker.messages import FromWorker, Step


class Heartbeat:
    """What a worker says it was told and has to do, and for how many looks it has said nothing.

    A worker speaks after every step, and after every message that leads to no step. So one that has work, or a message
    it has not taken in, and is silent, is stuck or slow; how many looks are too many is for the supervisor to say.
    """

    def __init__(self) -> None:
        self._received = 0  # messages, by its own account
        self._busy = False  # it has sequences, by its own account
        self._silent = 0

    def heard(self, message: FromWorker) -> None:
        self._silent = 0
        if isinstance(message, Step):
            self._received = message.received
            self._busy = message.stats.running + message.stats.waiting > 0

    def has_work(self, sent: int) -> bool:
        """sent: messages it was told so far. Whether there is something that it has to do, or to take in."""
        return self._busy or sent > self._received

    def look(self, sent: int) -> int:
        """sent: messages it was told so far. Returns for how many looks it has been silent with something to do."""
        self._silent = self._silent + 1 if self.has_work(sent) else 0
        return self._silent
