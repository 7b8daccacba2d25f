"""What a step needs of every row, kept by seat in arrays, so that laying out many rows is no loop over them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from model.row import Row

HOST = -1  # a place: the row's last token is not on the device, or the host knows it too


class Seats:
    """A sequence keeps its seat from the step that adds it to the one that removes it."""

    def __init__(self, count: int, max_blocks: int) -> None:
        self.tables: npt.NDArray[np.int32] = np.zeros((count, max_blocks), dtype=np.int32)
        self.places: npt.NDArray[np.int32] = np.full(count, HOST, dtype=np.int32)  # where the device has the last token
        self._free = list(reversed(range(count)))
        self._of: dict[int, int] = {}

    def take(self, id_: int, row: Row) -> int:
        """The row's block table is a line of `tables` from now on."""
        seat = self._of[id_] = self._free.pop()
        self.tables[seat] = row.blocks
        row.blocks = self.tables[seat]
        self.places[seat] = HOST
        return seat

    def leave(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            self._free.append(self._of.pop(id_))

    def of(self, ids: Iterable[int]) -> npt.NDArray[np.int64]:
        """(ids,)."""
        seats = self._of
        return np.array([seats[id_] for id_ in ids], dtype=np.int64)

    def clear_places(self) -> None:
        self.places.fill(HOST)

    def place(self, seats: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> None:
        """These have their last tokens at these places on the device, and all others nowhere there."""
        self.clear_places()
        self.places[seats] = places
