"""Which sequence kills workers? Pure: no clock, no I/O; it is told of deaths and says who may go to a worker next.

The worker is killed from outside now and then, and then everybody on it is innocent. So the first death changes
nothing: all are sent again. Who has been on a second worker that died, and got no token in between, is a suspect; from
then on nobody is sent anywhere but the suspects, one at a time, and each of them is cleared by its next token. Whoever
was all alone with a worker when it died, and had been on one that died before, is the one.

So a killer costs at most four deaths: two among others, one on trial among those cleared before it, and one alone.

A worker that died before it began to work on a sequence says nothing about that sequence. A worker that was killed from
outside says little: it may have been the kernel, for want of memory that the sequence took. So where each death was of
that kind a sequence is found guilty only after its fourth.

It cannot know a killer that gets on between its murders (a new token clears it), nor two that only kill together; they
are left to the supervisor, which gives up on a worker that keeps dying.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

SUSPECT = 2  # deaths
KILLED_FROM_OUTSIDE = 4  # deaths before a sequence is blamed for a worker that was killed from outside


class Quarantine:
    def __init__(self) -> None:
        self._deaths: dict[int, int] = {}  # by sequence: of workers it was on, since its last token
        self._on_trial: int | None = None

    def died(self, ids: list[int], began: Collection[int], *, killed: bool) -> int | None:
        """A worker died that had these. began: those of them that it had begun to work on. killed: from outside.

        Returns the sequence that killed it, if that is certain.
        """
        for id_ in began:
            self._deaths[id_] = self._deaths.get(id_, 0) + 1
        if self._on_trial in ids:
            self._on_trial = None
        if len(began) != 1:
            return None
        (only,) = began
        return only if self._deaths[only] >= (KILLED_FROM_OUTSIDE if killed else SUSPECT) else None

    def cleared(self, id_: int) -> bool:
        """It got a token, or has left. Returns whether others were waiting for that."""
        suspect = self._deaths.pop(id_, 0) >= SUSPECT
        if self._on_trial == id_:
            self._on_trial = None
        return suspect

    def admit(self, ids: Iterable[int]) -> list[int]:
        """Of sequences that no worker has, those that may be sent to one now; whoever calls sends them."""
        suspects = [id_ for id_, deaths in self._deaths.items() if deaths >= SUSPECT]
        if not suspects:
            return list(ids)
        if self._on_trial is None:
            # Who died on trial among others goes first, so as to be alone; after that the newest, for the old ones
            # have been around for longer and done no harm.
            here = set(ids)
            waiting = [id_ for id_ in suspects if id_ in here]
            self._on_trial = max(waiting, key=lambda id_: (self._deaths[id_], id_), default=None)
            return [] if self._on_trial is None else [self._on_trial]
        return []
