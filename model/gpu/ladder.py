"""The batch sizes for which decode steps are recorded. A step of another size is padded to the next one up. Pure."""

from __future__ import annotations

from bisect import bisect_left

_DENSE_UNTIL = 8  # powers of two up to it: there, a padded row costs nothing


class Ladder:
    """Rungs 1, 2, 4, 8, then half as much again and the next power of two in turn, up to the largest batch."""

    def __init__(self, largest: int) -> None:
        """largest: at least 1; always a rung itself."""
        sizes = {largest}
        size = 1
        while size < largest:
            sizes.add(size)
            if size >= _DENSE_UNTIL and size * 3 // 2 < largest:
                sizes.add(size * 3 // 2)
            size *= 2
        self._sizes = sorted(sizes)

    @property
    def sizes(self) -> list[int]:
        """Rising."""
        return list(self._sizes)

    def rung(self, rows: int) -> int | None:
        """The smallest rung that holds so many rows; None above the last."""
        at = bisect_left(self._sizes, rows)
        return self._sizes[at] if at < len(self._sizes) else None

    def without(self, below: int) -> Ladder:
        """Only the rungs from `below` on: those for which there was time."""
        ladder = Ladder(self._sizes[-1])
        ladder._sizes = [size for size in self._sizes if size >= below]
        return ladder
