from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.gpu.ladder import Ladder


def test_the_rungs_up_to_five_hundred() -> None:
    assert Ladder(1).sizes == [1]
    assert Ladder(6).sizes == [1, 2, 4, 6]
    assert Ladder(512).sizes == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


@given(st.integers(1, 2000), st.integers(1, 2500))
def test_a_batch_is_padded_by_less_than_itself(largest: int, rows: int) -> None:
    rung = Ladder(largest).rung(rows)
    if rows > largest:
        assert rung is None
    else:
        assert rung is not None
        assert rows <= rung < 2 * rows or rung == rows == 1
        assert not [size for size in Ladder(largest).sizes if rows <= size < rung]


def test_rungs_below_can_be_left_out() -> None:
    short = Ladder(64).without(below=24)
    assert short.sizes == [24, 32, 48, 64]
    assert short.rung(1) == 24
