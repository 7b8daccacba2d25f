"""Every paged attention against the whole thing in float64. Triton runs in its interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from model.batch import Batch
from model.gpu import ops
from model.gpu.attention import GatheredAttention, PagedAttention
from model.kv_cache import LayerCache

BLOCKS, POISON = 48, 1e30  # what must not be read
CPU = torch.device("cpu")


def attentions() -> list[object]:
    needs = "Triton is not installed; it comes with CUDA builds of PyTorch, and runs on a CPU with TRITON_INTERPRET=1"
    skip = pytest.mark.skipif(not ops.HAS_TRITON, reason=needs)
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
        self.cache = LayerCache(torch.full(shape, POISON), torch.full(shape, POISON))

    def batch(self) -> tuple[Tensor, Batch]:
        counts = [count for count, _ in self.spans]
        positions = torch.cat([torch.arange(context - count, context) for count, context in self.spans])
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        rows = torch.cat([qkv[-count:] for qkv, count in zip(self.qkv, counts, strict=True)])
        batch = Batch(
            tokens=positions,
            positions=positions,
            slots=self.slots(owners, positions),
            query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
            contexts=torch.tensor([context for _, context in self.spans], dtype=torch.int32),
            block_tables=self.tables,
            spans=tuple(self.spans),
        )
        return rows, batch

    def slots(self, owners: Tensor, positions: Tensor) -> Tensor:
        size = self.block_size
        return (self.tables[owners, positions // size].long() * size + positions % size).int()

    def fill(self, attention: PagedAttention) -> None:
        """The positions before the step's."""
        for i, (count, context) in enumerate(self.spans):
            before = context - count
            if before:
                slots = self.slots(torch.full((before,), i), torch.arange(before))
                attention.write(self.qkv[i][:before], self.cache, slots)

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
    case.fill(attention)
    rows, batch = case.batch()
    attention.write(rows, case.cache, batch.slots)
    torch.testing.assert_close(attention.mixed(rows, case.cache, batch, 0.3), case.expected(), atol=2e-5, rtol=1e-4)


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
    case.fill(attention)
    rows, batch = case.batch()
    attention.write(rows, case.cache, batch.slots)
    found = attention.decode(rows, case.cache, batch.block_tables, batch.contexts, 0.3)
    torch.testing.assert_close(found, case.expected(), atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not ops.HAS_TRITON, reason="Triton is not installed")
def test_deterministic_prefill_has_the_bits_of_decoding() -> None:
    attention = make("deterministic")
    whole = Case([(300, 300)], 2, 16, 16)
    rows, batch = whole.batch()
    attention.write(rows, whole.cache, batch.slots)
    together = attention.mixed(rows, whole.cache, batch, 0.3)
    for position in (0, 15, 63, 64, 255, 256, 299):
        contexts = torch.tensor([position + 1], dtype=torch.int32)
        alone = attention.decode(rows[position : position + 1], whole.cache, batch.block_tables, contexts, 0.3)
        assert torch.equal(alone[0], together[position])
