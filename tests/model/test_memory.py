"""Arrays in huge pages."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.memory import CACHE_LINE, CHUNK, HUGE_PAGE, HugePages, ReusedRows, give_back_code, huge_zeros


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


CODE = """
import re, torch
from pathlib import Path
from model.memory import give_back_code

def mapped():  # MiB of files
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before = mapped()
give_back_code()
after = mapped()
print(before - after, float((torch.ones(40, 40) @ torch.ones(40, 40)).softmax(0).sum()), mapped() - after)
"""


def test_rows_are_reused_and_grow() -> None:
    rows = ReusedRows(50257)
    first = rows(1).fill_(1)
    assert first.shape == (1, 50257)
    rows(5).fill_(5)
    assert first[0, 0] == 1, "a longer result has memory of its own"
    place = rows(5).data_ptr()
    assert {rows(count).data_ptr() for count in (1, 3, 8)} == {place}
    assert (rows(5) == 5).all()
    assert rows(9).data_ptr() != place


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_code_that_starting_needed_is_let_go_and_comes_back_where_it_is_called() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    given_back, computed, came_back = map(float, done.stdout.split())
    assert computed == pytest.approx(40)
    assert came_back > 0
    assert given_back - came_back > 30  # how much around what is called is mapped with it differs between file systems


def test_it_does_nothing_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", unreadable)
    give_back_code()
