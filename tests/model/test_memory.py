"""Arrays in huge pages."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from model.memory import CACHE_LINE, CHUNK, HUGE_PAGE, HugePages, huge_zeros


def test_a_large_array_begins_on_a_huge_page() -> None:
    array = huge_zeros(3 * HUGE_PAGE + 5)
    assert (len(array), array.data_ptr() % HUGE_PAGE, int(array.count_nonzero())) == (3 * HUGE_PAGE + 5, 0, 0)


@given(st.lists(st.integers(1, 3 * CHUNK // 2), min_size=1, max_size=8))
def test_arrays_lie_apart_on_cache_lines_of_their_own(sizes: list[int]) -> None:
    pages = HugePages()
    arrays = [pages.zeros(size) for size in sizes]
    places = sorted((array.data_ptr(), len(array)) for array in arrays)
    assert [len(array) for array in arrays] == sizes
    assert all(start % CACHE_LINE == 0 for start, _ in places)
    assert all(start + size <= after for (start, size), (after, _) in pairwise(places))


def test_small_arrays_share_their_pages() -> None:
    pages = HugePages()
    first, second = pages.zeros(CACHE_LINE + 1), pages.zeros(1)
    assert second.data_ptr() - first.data_ptr() == 2 * CACHE_LINE
