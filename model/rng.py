"""Counter-based uniform numbers. Knows nothing of what they pick.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the seed,
its counter the choice and the position. There is no state: the number for a token is the same whenever, wherever and
beside whatever it is computed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10


def philox(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Four 32-bit words for each counter. counter: (4, n) words; returns (4, n) words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        low_product = c0 * _MULTIPLIERS[0]
        high_product = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high_product >> _32) ^ c1 ^ np.uint64(k0),
            high_product & _LOW,
            (low_product >> _32) ^ c3 ^ np.uint64(k1),
            low_product & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def uniforms(seed: int, choice: int, start: int, count: int, word: int = 0) -> npt.NDArray[np.float64]:
    """The numbers in [0, 1) for positions [start, start + count) of one choice of a seeded request.

    word: which of the four independent numbers of a position, 0 to 3.
    Multiples of 2^-32, so that u x total < total for every total a float64 sum of probabilities can have.
    """
    counter = np.zeros((4, count), dtype=np.uint64)
    counter[0] = np.arange(start, start + count, dtype=np.uint64)
    counter[1] = choice
    seed &= (1 << 64) - 1
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    numbers: npt.NDArray[np.float64] = words[word] * 2.0**-32
    return numbers
