from __future__ import annotations

import numpy as np
import pytest

from model.rng import philox, uniforms

# Known answers of philox4x32-10, published with Random123 (kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    got = philox(np.array(counter, dtype=np.uint64)[:, None], key)
    assert tuple(int(word) for word in got[:, 0]) == words


def test_a_number_depends_on_seed_choice_and_position_alone() -> None:
    whole = uniforms(7, 2, 0, 200)
    assert (uniforms(7, 2, 150, 10) == whole[150:160]).all()
    assert (uniforms(7, 3, 0, 200) != whole).mean() > 0.99
    assert (uniforms(8, 2, 0, 200) != whole).mean() > 0.99


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_every_64_bit_seed_is_taken(seed: int) -> None:
    numbers = uniforms(seed, 0, 0, 1000)
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_numbers_are_uniform_across_positions_and_across_seeds() -> None:
    for numbers in (uniforms(1, 0, 0, 20_000), np.array([uniforms(s, 0, 5, 1)[0] for s in range(5_000)])):
        counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
        expected = len(numbers) / 20
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
