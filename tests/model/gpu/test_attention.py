"""Every paged attention against the whole thing in float64. Triton runs in its interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from model.attention import write_kv
from model.batch import Batch
from model.gpu import cuda, ops
from model.gpu.attention import GatheredAttention, PagedAttention
from model.kv_cache import LayerCache

BLOCKS, POISON = 48, 1e30  # what must not be read
NO_TRITON = "there is no Triton for this system"
DEVICE = torch.device("cuda" if cuda.available() else "cpu")


def attentions() -> list[object]:
    skip = pytest.mark.skipif(not ops.HAS_TRITON, reason=NO_TRITON)
    return [
        pytest.param("gathered", id="gathered"),
        pytest.param("triton", id="triton", marks=skip),
        pytest.param("deterministic", id="deterministic", marks=skip),
    ]


def make(name: str) -> PagedAttention:
    return GatheredAttention() if name == "gathered" else ops.TritonAttention(deterministic=name == "deterministic")


class Case:
    """Sequences in scattered blocks, all but the rows of one step already in the cache."""

    def __init__(self, spans: list[tuple[int, int]], heads: int, head_dim: int, block_size: int) -> None:
        """spans: (rows, context) of each sequence."""
        generator = torch.Generator().manual_seed(5)
        self.spans, self.heads, self.head_dim, self.block_size = spans, heads, head_dim, block_size
        width = heads * head_dim
        self.qkv = [torch.randn(context, 3 * width, generator=generator) for _, context in spans]
        blocks = torch.randperm(BLOCKS, generator=generator).tolist()
        needed = [-(-context // block_size) for _, context in spans]
        self.tables = torch.zeros(len(spans), max(needed) + 1, dtype=torch.int32)
        for i, count in enumerate(needed):
            self.tables[i, :count] = torch.tensor([blocks.pop() for _ in range(count)])
        shape = (BLOCKS, heads, block_size, head_dim)
        self.cache = LayerCache(*(torch.full(shape, POISON, device=DEVICE) for _ in range(2)))

    def batch(self) -> tuple[Tensor, Batch]:
        counts = [count for count, _ in self.spans]
        positions = torch.cat([torch.arange(context - count, context) for count, context in self.spans])
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        rows = torch.cat([qkv[-count:] for qkv, count in zip(self.qkv, counts, strict=True)])
        batch = Batch(
            tokens=positions.to(DEVICE),
            positions=positions.to(DEVICE),
            slots=self.slots(owners, positions).to(DEVICE),
            query_starts=torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE),
            contexts=torch.tensor([context for _, context in self.spans], dtype=torch.int32, device=DEVICE),
            block_tables=self.tables.to(DEVICE),
            spans=tuple(self.spans),
        )
        return rows.to(DEVICE), batch

    def slots(self, owners: Tensor, positions: Tensor) -> Tensor:
        size = self.block_size
        return (self.tables[owners, positions // size].long() * size + positions % size).int()

    def fill(self) -> None:
        """The positions before the step's."""
        for i, (count, context) in enumerate(self.spans):
            before = context - count
            if before:
                slots = self.slots(torch.full((before,), i), torch.arange(before))
                write_kv(self.qkv[i][:before].to(DEVICE), self.cache, slots.to(DEVICE))

    def stored(self) -> list[Tensor]:
        """What the cache must hold after the step: (context, 2 * width) keys and values of each sequence."""
        return [qkv[:, self.heads * self.head_dim :] for qkv in self.qkv]

    def found(self) -> list[Tensor]:
        """What it holds."""
        pools = []
        for i, (_, context) in enumerate(self.spans):
            slots = self.slots(torch.full((context,), i), torch.arange(context))
            blocks, offsets = slots // self.block_size, slots % self.block_size
            parts = [pool.cpu()[blocks, :, offsets].flatten(1) for pool in (self.cache.keys, self.cache.values)]
            pools.append(torch.cat(parts, dim=1))
        return pools

    def expected(self) -> Tensor:
        out = []
        for qkv, (count, _) in zip(self.qkv, self.spans, strict=True):
            query, key, value = qkv.double().view(-1, 3, self.heads, self.head_dim).permute(1, 2, 0, 3)
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
            out.append(mixed.transpose(0, 1).flatten(1)[-count:])
        return torch.cat(out).float()


def shapes(rows: st.SearchStrategy[int]) -> st.SearchStrategy[list[tuple[int, int]]]:
    span = st.tuples(rows, st.integers(0, 90)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    return st.lists(span, min_size=1, max_size=3)


SIZES = st.sampled_from([(2, 32, 16), (1, 20, 8), (3, 16, 32)])


@pytest.mark.parametrize("name", attentions())
@settings(max_examples=8, deadline=None)
@given(shapes(st.integers(1, 40)), SIZES)
def test_rows_of_prompts_attend_to_all_before_them(
    name: str, spans: list[tuple[int, int]], sizes: tuple[int, int, int]
) -> None:
    attention, case = make(name), Case(spans, *sizes)
    case.fill()
    rows, batch = case.batch()
    torch.testing.assert_close(
        attention.mixed(rows, case.cache, batch, 0.3).cpu(), case.expected(), atol=2e-5, rtol=1e-4
    )
    assert all(map(torch.equal, case.found(), case.stored()))


@pytest.mark.parametrize("name", attentions())
@settings(max_examples=8, deadline=None)
@given(shapes(st.just(1)), SIZES)
def test_a_decoded_row_attends_to_its_sequence(
    name: str, spans: list[tuple[int, int]], sizes: tuple[int, int, int]
) -> None:
    attention, case = make(name), Case(spans, *sizes)
    if name == "gathered":  # it multiplies what it must not see by nothing, so that must be finite: the pool is zeros
        case.cache.keys.zero_()
        case.cache.values.zero_()
    case.fill()
    rows, batch = case.batch()
    torch.testing.assert_close(
        attention.decode(rows, case.cache, batch, 0.3).cpu(), case.expected(), atol=2e-5, rtol=1e-4
    )
    assert all(map(torch.equal, case.found(), case.stored()))


@pytest.mark.skipif(not ops.HAS_TRITON, reason=NO_TRITON)
def test_deterministic_prefill_has_the_bits_of_decoding() -> None:
    attention = make("deterministic")
    whole = Case([(300, 300)], 2, 16, 16)
    rows, batch = whole.batch()
    together = attention.mixed(rows, whole.cache, batch, 0.3)
    for position in (0, 15, 63, 64, 255, 256, 299):
        one = replace(batch, contexts=torch.tensor([position + 1], dtype=torch.int32, device=DEVICE))
        alone = attention.decode(rows[position : position + 1], whole.cache, one, 0.3)
        assert torch.equal(alone[0], together[position])
