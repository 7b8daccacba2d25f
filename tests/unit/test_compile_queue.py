"""Clients take turns by the compiler's time, whatever they send."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.compile_queue import CompileQueue


def test_of_one_clients_grammars_the_shortest_is_first_and_of_equals_the_one_that_came_first() -> None:
    queue = CompileQueue[str]()
    for size, item in ((5, "a"), (3, "b"), (5, "c"), (1, "d")):
        queue.add("x", size, item)
    assert [queue.take()[1] for _ in range(4)] == ["d", "b", "a", "c"]


def test_who_comes_now_owes_nothing_and_is_owed_nothing() -> None:
    queue = CompileQueue[str]()
    queue.add("old", 1, "a")
    queue.take()
    queue.spent("old", 100.0)
    queue.add("new", 1, "b")
    queue.add("old", 1, "c")
    assert [queue.take() for _ in range(2)] == [("new", "b"), ("old", "c")]
    queue.spent("old", 1.0)
    for number in range(5):
        queue.add("new", 1, f"n{number}")
        assert queue.take()[0] == "new"
        queue.spent("new", 1.0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.01, 1.0)), min_size=1, max_size=60))
def test_of_two_that_wait_all_the_time_neither_gets_ahead_by_more_than_one_grammar(
    asked: list[tuple[str, float]],
) -> None:
    queue, had = CompileQueue[float](), dict.fromkeys("abc", 0.0)
    for client, seconds in asked:
        queue.add(client, 1, seconds)
    waited = set(had) & {client for client, _ in asked}
    while queue:
        client, seconds = queue.take()
        queue.spent(client, seconds)
        had[client] += seconds
        if not queue.waiting(client):
            waited.discard(client)
        still = [had[each] for each in waited]
        assert not still or max(still) - min(still) <= 1.0
    assert len(queue) == 0
