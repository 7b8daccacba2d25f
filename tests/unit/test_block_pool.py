"""Blocks: counted, shared by content, evicted least recently used and tails first, freed exactly once."""

from __future__ import annotations

import pytest

from server.worker import block_pool
from server.worker.block_pool import BlockKey, BlockPool, block_keys, root_digest

Tokens = list[int]


def keys_of(*blocks: Tokens, salt: bytes = b"") -> list[BlockKey]:
    return block_keys(root_digest(salt), [token for tokens in blocks for token in tokens], 2)


def hold(pool: BlockPool, *blocks: Tokens, salt: bytes = b"") -> list[int]:
    """Allocate and register blocks that hold these tokens, one after the other."""
    table = pool.allocate(len(blocks))
    for block, key in zip(table, keys_of(*blocks, salt=salt), strict=True):
        pool.register(block, key)
    return table


A, B, C, D = [1, 2], [3, 4], [5, 6], [7, 8]


def test_books_balance_from_first_to_last() -> None:
    pool = BlockPool(4, 2)
    table = pool.allocate(3)
    assert (pool.num_free, pool.num_used) == (1, 3)
    assert len(set(table)) == 3
    pool.check([table])
    pool.free(table)
    assert (pool.num_free, pool.num_used) == (4, 0)
    pool.check([])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(4, 16).blocks_for(tokens) == blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (16, 0)])
def test_a_pool_of_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(num_blocks, block_size)


def test_the_longest_cached_prefix_is_found() -> None:
    pool = BlockPool(8, 2)
    table = hold(pool, A, B, C)
    assert pool.match(keys_of(A, B, C, D)) == table
    assert pool.match(keys_of(A, B, D)) == table[:2]
    assert pool.match(keys_of(D, A, B)) == []
    assert pool.match([]) == []


def test_a_block_is_found_behind_its_own_prefix_only() -> None:
    pool = BlockPool(8, 2)
    hold(pool, A, B)
    assert pool.match(keys_of(B)) == []
    assert pool.match(keys_of(C, B)) == []


def test_keys_grow_with_their_sequence() -> None:
    first = keys_of(A)
    assert first + block_keys(first[-1].digest, B + C, 2) == keys_of(A, B, C)


def test_salts_share_nothing() -> None:
    pool = BlockPool(8, 2)
    table = hold(pool, A, B, salt=b"alice")
    assert pool.match(keys_of(A, B, salt=b"bob")) == []
    assert pool.match(keys_of(A, B)) == []
    assert pool.match(keys_of(A, B, salt=b"alice")) == table


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(4, 2)
    table = hold(pool, A, B)
    pool.share(table)
    pool.check([table, table])
    pool.free(table)
    assert pool.num_used == 2
    pool.free(table)
    assert pool.num_used == 0


def test_a_free_block_is_still_found_and_taken_back() -> None:
    pool = BlockPool(4, 2)
    table = hold(pool, A, B)
    pool.free(table)
    found = pool.match(keys_of(A, B))
    assert found == table
    assert pool.available(found) == 2
    pool.share(found)
    assert pool.num_free == 2
    pool.check([found])


def test_a_held_block_costs_nothing_to_share() -> None:
    pool = BlockPool(4, 2)
    assert pool.available(hold(pool, A, B)) == 2


def test_tails_are_evicted_before_heads() -> None:
    pool = BlockPool(3, 2)
    table = hold(pool, A, B, C)
    pool.free(table)
    pool.allocate(1)
    assert pool.match(keys_of(A, B, C)) == table[:2]
    pool.allocate(1)
    assert pool.match(keys_of(A, B, C)) == table[:1]


def test_the_least_recently_used_goes_first() -> None:
    pool = BlockPool(3, 2)
    first, second, third = (hold(pool, tokens) for tokens in (A, B, C))
    for table in (second, first, third):
        pool.free(table)
    pool.share(second)  # used once more, so it is the newest now
    pool.free(second)
    assert [pool.allocate(1) for _ in range(3)] == [first, third, second]


def test_blocks_without_a_key_go_before_any_cached_one() -> None:
    pool = BlockPool(4, 2)
    cached = hold(pool, A, B)
    plain = pool.allocate(2)
    pool.free(cached)
    pool.free(plain)
    assert sorted(pool.allocate(2)) == sorted(plain)
    assert pool.match(keys_of(A, B)) == cached


def test_an_evicted_block_is_found_no_more() -> None:
    pool = BlockPool(2, 2)
    pool.free(hold(pool, A, B))
    table = pool.allocate(2)
    assert pool.match(keys_of(A, B)) == []
    pool.check([table])


def test_of_two_blocks_of_one_content_the_older_stays_known() -> None:
    pool = BlockPool(4, 2)
    older, newer = hold(pool, A), hold(pool, A)
    assert pool.match(keys_of(A)) == older
    pool.free(older)
    pool.free(newer)
    pool.check([])


def test_a_collision_of_digests_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def __init__(self, data: bytes) -> None:
            pass

        def digest(self) -> bytes:
            return bytes(32)

    monkeypatch.setattr(block_pool, "sha256", Constant)
    pool = BlockPool(4, 2)
    table = hold(pool, A)
    assert keys_of(A)[0].digest == keys_of(B)[0].digest
    assert pool.match(keys_of(B)) == []
    assert pool.match(keys_of(A)) == table
    other = hold(pool, B)  # does not push the first out, nor corrupt the index
    pool.check([table, other])
    assert pool.match(keys_of(A)) == table


def test_switched_off_nothing_is_found() -> None:
    pool = BlockPool(4, 2, enable_prefix_caching=False)
    hold(pool, A, B)
    assert pool.match(keys_of(A, B)) == []


def test_taking_more_than_there_is_freeing_twice_and_naming_a_free_block_are_our_own_faults() -> None:
    pool = BlockPool(2, 2)
    with pytest.raises(AssertionError, match="more blocks than are free"):
        pool.allocate(3)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.free(table)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.register(table[0], keys_of(A)[0])


def test_check_sees_a_leak_and_a_block_owned_twice() -> None:
    pool = BlockPool(4, 2)
    table = pool.allocate(2)
    with pytest.raises(AssertionError, match="references differ"):
        pool.check([])
    with pytest.raises(AssertionError, match="references differ"):
        pool.check([table, table[:1]])
