"""How much of a worker each owner of sequences has had: the scheduler serves first whoever has had the fewest tokens.

After Sheng et al. 2024 ("Fairness in Serving Large Language Models", virtual token counters): an owner who comes back
is lifted to the least of those who are here, so that nobody saves up a claim while away. Pure. Knows owners by name,
and nothing of sequences, seats or blocks.
"""

from __future__ import annotations


class Shares:
    def __init__(self) -> None:
        self._live: dict[str, int] = {}  # sequences of each owner that has any
        self._served: dict[str, int] = {}  # tokens computed for each of these, or what it was lifted to

    @property
    def owners(self) -> int:
        return len(self._live)

    @property
    def several(self) -> bool:
        """Else there is nothing to share."""
        return len(self._live) > 1

    def joined(self, owner: str) -> None:
        """One sequence more."""
        if owner not in self._live:
            here = [self._served[each] for each in self._live]
            if not here:
                self._served.clear()
            self._served[owner] = max([self._served.get(owner, 0), *([min(here)] if here else [])])
        self._live[owner] = self._live.get(owner, 0) + 1

    def left(self, owner: str) -> None:
        """One less."""
        self._live[owner] -= 1
        if not self._live[owner]:
            del self._live[owner]

    def charge(self, owner: str, tokens: int) -> None:
        self._served[owner] += tokens

    def served(self, owner: str) -> int:
        return self._served[owner]
