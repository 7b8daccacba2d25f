"""The C kernels against float64, and the promise that a row's bits never depend on the rows beside it."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model import loading
from model.batch import Batch, Wanted
from model.config import Activation, parse_config
from model.errors import DeviceError
from model.gpt2 import GPT2
from model.kernels import structs
from model.kernels.forward import Forward
from model.kernels.layers import KernelEmbedding, KernelNorm, PackedLinear, Storage
from model.kernels.library import LEVELS, Kernels, KernelsUnavailableError, load
from model.kernels.ops import KernelOps
from model.kv_cache import KVCache, LayerCache
from model.linear import activate
from model.loading import choose_kv_dtype, choose_ops
from model.scores import score
from model.weights import expected_shapes

ROWS = (1, 2, 3, 8, 31, 64, 128)
SHAPES = ((768, 192), (3072, 64), (100, 77), (258, 33), (5, 1))  # (in, out)


def load_or_skip(level: str | None, threads: int) -> Kernels:
    try:
        return load(level, threads)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=list(LEVELS))
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    kernels = load_or_skip(request.param, threads=1)
    yield kernels
    kernels.set_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# === Linear layers ===


def make_linear(kernels: Kernels, shape: tuple[int, int], storage: Storage) -> tuple[PackedLinear, Tensor, Tensor]:
    """A packed layer, its weight and its bias in float64."""
    inputs, outputs = shape
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    return PackedLinear(kernels, weight, bias, storage), weight.double(), bias.double()


# int8: 8-bit activations keep about 1 % of the result's norm as error, 7-bit ones (no VNNI) 2 to 3 %.
@pytest.mark.parametrize(("storage", "tolerance"), [(Storage.FP32, 2e-6), (Storage.FP16, 4e-4), (Storage.INT8, 0.04)])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_near_float64(kernels: Kernels, storage: Storage, tolerance: float, shape: tuple[int, int]) -> None:
    linear, weight, bias = make_linear(kernels, shape, storage)
    for rows in ROWS:
        x = torch.randn(rows, shape[0])
        x[:, 3] *= 10  # GPT-2 has such coordinates
        error = linear(x) - bias - functional.linear(x.double(), weight)
        assert error.norm() <= tolerance * x.norm() * weight.norm() / shape[0] ** 0.5


def test_int8_error_is_bounded_by_its_steps(kernels: Kernels) -> None:
    linear, weight, bias = make_linear(kernels, (258, 33), Storage.INT8)
    x = torch.randn(17, 258)
    levels = 255 if kernels.level == LEVELS["vnni"] else 127
    groups = x.split(256, dim=1)
    step = torch.cat(
        [((g.amax(1).clamp(min=0) - g.amin(1).clamp(max=0)) / levels)[:, None].expand_as(g) for g in groups], dim=1
    ).double()
    weight_step = weight.abs().amax(1, keepdim=True) / 127
    # Each product errs by at most half a step of x (a whole one at a clamped end) and half a step of the weight.
    bound = functional.linear(step, weight.abs()) + functional.linear(
        x.abs().double() + step, weight_step.expand_as(weight) / 2
    )
    assert ((linear(x) - bias - functional.linear(x.double(), weight)).abs() <= bound + 1e-5).all()


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_in_any_batch_and_on_any_threads(
    kernels: Kernels, storage: Storage, shape: tuple[int, int]
) -> None:
    linear, _, _ = make_linear(kernels, shape, storage)
    x, residual = torch.randn(max(ROWS), shape[0]), torch.randn(max(ROWS), shape[1])
    alone = torch.cat([linear(x[i : i + 1], residual=residual[i : i + 1]) for i in range(len(x))])
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for rows in ROWS:
            assert torch.equal(linear(x[-rows:], residual=residual[-rows:]), alone[-rows:])


def test_the_vocabulary_head(kernels: Kernels) -> None:
    linear, weight, bias = make_linear(kernels, (64, 50257), Storage.FP32)
    x = torch.randn(3, 64)
    torch.testing.assert_close(linear(x).double(), functional.linear(x.double(), weight, bias), atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", Activation)
def test_activations(kernels: Kernels, activation: Activation) -> None:
    weight = torch.eye(40)
    linear = PackedLinear(kernels, weight, None)
    x = torch.cat([torch.linspace(-12, 12, 397), torch.tensor([-100.0, 0.0, 100.0])]).view(10, 40)
    torch.testing.assert_close(
        linear(x, activation=activation).double(), activate(x.double(), activation), atol=1e-6, rtol=1e-6
    )


def test_transposed_weights_and_no_bias(kernels: Kernels) -> None:
    weight = torch.randn(70, 50)  # as Hugging Face's Conv1D keeps it: (in, out)
    x = torch.randn(4, 70)
    torch.testing.assert_close(PackedLinear(kernels, weight.T, None)(x), x @ weight, atol=1e-4, rtol=0)


def test_int8_of_zeros_is_the_bias(kernels: Kernels) -> None:
    bias = torch.randn(20)
    linear = PackedLinear(kernels, torch.zeros(20, 30), bias, Storage.INT8)
    assert torch.equal(linear(torch.randn(2, 30)), bias.expand(2, -1))
    linear = PackedLinear(kernels, torch.randn(20, 30), bias, Storage.INT8)
    assert torch.equal(linear(torch.zeros(2, 30)), bias.expand(2, -1))


# === Layer norm and embedding ===


@pytest.mark.parametrize("width", [768, 100, 7])
def test_norm(kernels: Kernels, width: int) -> None:
    x, weight, bias = torch.randn(9, width) * 3 + 1, torch.randn(width), torch.randn(width)
    norm = KernelNorm(kernels, weight, bias, 1e-5)
    found = norm(x)
    expected = functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(norm(x[4:5]), found[4:5])


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("width", [33, 300])
def test_tokens_are_embedded_with_what_the_head_holds(kernels: Kernels, storage: Storage, width: int) -> None:
    tokens, positions = torch.randint(50, (20,)), torch.randint(30, (20,))
    wte, wpe = torch.randn(50, width), torch.randn(30, width)
    step = wte.abs().amax(1, keepdim=True) / 127
    held = {
        Storage.FP32: wte,
        Storage.FP16: wte.half().float(),
        Storage.INT8: (wte / wte.abs().amax(1, keepdim=True) * 127).round() * step,
    }[storage]
    none = torch.empty(0, dtype=torch.int32)
    batch = Batch(tokens, positions, torch.empty(0, dtype=torch.int64), none, none, none.view(0, 0), ())
    embed = KernelEmbedding(kernels, PackedLinear(kernels, wte, None, storage), wpe)
    assert torch.equal(embed(batch), held[tokens] + wpe[positions])


# === Attention ===


class Sequences:
    """Some sequences' queries, keys and values, and a cache whose blocks are handed out in no order."""

    def __init__(self, lengths: list[int], heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
        self.qkv = [torch.randn(length, 3 * heads * head_dim) for length in lengths]
        self.heads, self.head_dim, self.block_size = heads, head_dim, block_size
        width = -(-max(lengths) // block_size)
        self.tables = torch.randperm(len(lengths) * width).int().view(len(lengths), width)
        # What nobody wrote may be anything: NaN here, so that a read too many shows.
        shape = (len(lengths) * width, heads, block_size, head_dim)
        self.cache = LayerCache(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))

    def step(self, kernels: Kernels, chunks: list[tuple[int, int, int]]) -> list[Tensor]:
        """Write and attend to rows [start, stop) of each (sequence, start, stop). Returns (rows, n_embd) of each."""
        qkv = torch.cat([self.qkv[s][start:stop] for s, start, stop in chunks])
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in chunks])
        owners = torch.cat([torch.full((stop - start,), s) for s, start, stop in chunks])
        size = self.block_size
        slots = self.tables[owners, positions // size].long() * size + positions % size
        counts = [stop - start for _, start, stop in chunks]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        tables = self.tables[[s for s, _, _ in chunks]].contiguous()
        contexts = torch.tensor([stop for _, _, stop in chunks]).int()
        kernels.write_kv(qkv, self.cache, slots)
        batch = Batch(positions, positions, slots, starts, contexts, tables, ())
        out = kernels.attention(qkv, self.cache, batch, self.head_dim**-0.5)
        return list(out.split(counts))

    def expected(self, s: int) -> Tensor:
        query, key, value = self.qkv[s].double().view(-1, 3, self.heads, self.head_dim).permute(1, 2, 0, 3)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(0, 1).reshape(len(self.qkv[s]), -1)


LENGTHS = [1, 5, 64, 100, 200]
WHOLE = [(s, 0, length) for s, length in enumerate(LENGTHS)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float16, 5e-3)])
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(16, 16), (32, 48), (64, 16), (80, 32), (128, 16), (20, 5), (64, 1)]
)
def test_attention_is_near_float64(
    kernels: Kernels, dtype: torch.dtype, tolerance: float, head_dim: int, block_size: int
) -> None:
    sequences = Sequences(LENGTHS, 3, head_dim, block_size, dtype)
    for s, found in enumerate(sequences.step(kernels, WHOLE)):
        torch.testing.assert_close(found.double(), sequences.expected(s), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_attention_is_the_same_whole_chunked_decoded_and_in_any_blocks(
    kernels: Kernels, dtype: torch.dtype, head_dim: int
) -> None:
    sequences = Sequences(LENGTHS, 2, head_dim, 16, dtype)
    whole = sequences.step(kernels, WHOLE)
    for block_size, cut in ((16, 1), (32, 17), (5, 64), (64, 31)):
        others = Sequences(LENGTHS, 2, head_dim, block_size, dtype)
        others.qkv = sequences.qkv
        pieces: list[list[Tensor]] = [[] for _ in LENGTHS]
        for start, stop in pairwise(range(0, max(LENGTHS) + cut, cut)):
            kernels.set_threads(1 + start % 3)
            chunks = [(s, start, min(stop, length)) for s, length in enumerate(LENGTHS) if start < length]
            for (s, _, _), found in zip(chunks, others.step(kernels, chunks), strict=True):
                pieces[s].append(found)
        for found, parts in zip(whole, pieces, strict=True):
            assert torch.equal(torch.cat(parts), found)


def test_fp16_cache_holds_what_does_not_fit(kernels: Kernels) -> None:
    sequences = Sequences([3], 1, 16, 16, torch.float16)
    sequences.qkv[0][0, 32:] = 1e6  # a value no fp16 holds: the largest stands in, never an infinity
    (found,) = sequences.step(kernels, [(0, 0, 3)])
    assert found[0].tolist() == [65504.0] * 16


# === Scores ===


@pytest.mark.parametrize("width", [1, 7, 50, 50257])
def test_scores_are_those_of_the_log_softmax(kernels: Kernels, width: int) -> None:
    logits, tokens = torch.randn(9, width) * 4, torch.randint(width, (9,))
    for top in {0, 1, min(width, 20)}:
        found, expected = kernels.score(logits, tokens, [top] * 9), score(logits.double(), tokens, [top] * 9)
        torch.testing.assert_close(found.own.double(), expected.own, atol=5e-6, rtol=0)
        torch.testing.assert_close(found.values.double(), expected.values, atol=5e-6, rtol=0)
        assert torch.equal(found.ranks, expected.ranks)
        assert torch.equal(found.ids, expected.ids)
        alone = kernels.score(logits[4:5], tokens[4:5], [top])
        assert alone.rows() == found.rows()[4:5]


def test_of_equal_scores_the_first_token_comes_first(kernels: Kernels) -> None:
    found = kernels.score(torch.zeros(1, 40), torch.tensor([17]), [3])
    assert found.ids.tolist() == [[0, 1, 2]]
    assert found.ranks.tolist() == [1]


# === The whole network in one call ===


def make_network(ops: KernelOps) -> tuple[GPT2, KVCache]:
    config = parse_config(
        {"vocab_size": 61, "n_positions": 64, "n_embd": 40, "n_layer": 2, "n_head": 4, "eos_token_id": 60}
    )
    weights = {name: torch.randn(shape) / 8 for name, shape in expected_shapes(config).items()}
    return GPT2(config, weights, ops), KVCache(config, 8, 16, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("storage", Storage)
def test_one_call_is_layer_by_layer(kernels: Kernels, storage: Storage) -> None:
    ops = KernelOps(kernels, storage)
    network, cache = make_network(ops)
    embed = network._embed
    assert isinstance(embed, KernelEmbedding)
    forward = Forward(kernels, embed, network._layers, cache.layers, network.config.activation)
    tables = torch.tensor([[3, 1], [2, 5]], dtype=torch.int32)
    for counts in ((3, 20), (1, 1), (16, 2)):  # the second step decodes, the third needs shorter buffers
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        positions = torch.cat([torch.arange(count) for count in counts])
        owners = torch.arange(2).repeat_interleave(torch.tensor(counts))
        slots = tables[owners, positions // 16].long() * 16 + positions % 16
        contexts = torch.tensor(counts).int()
        batch = Batch(torch.randint(61, positions.shape), positions, slots, starts, contexts, tables, ())
        kernels.set_threads(2)
        found = forward(batch).clone()
        kernels.set_threads(1)
        assert torch.equal(found, network._layer_by_layer(batch, cache, ()))
        for last in ((1, 1), (0, min(2, counts[1])), (counts[0], 0), (0, 0)):
            rows = torch.cat([torch.arange(end - few, end) for end, few in zip(starts[1:].tolist(), last, strict=True)])
            wanted = Wanted(rows, positions[rows], torch.tensor([0, *last]).cumsum(0).int())
            some = replace(batch, wanted=wanted)
            assert torch.equal(forward(some), found[rows])
            assert torch.equal(network._layer_by_layer(some, cache, ()), found[rows])


def test_room_that_one_large_batch_took_is_given_back() -> None:
    """Of the activations, and of the rows packed for a linear layer."""
    said = alone("""
    import os, torch
    from pathlib import Path
    from model.kernels.layers import PackedLinear
    from model.kernels.library import load

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    linear = PackedLinear(load(threads=1), torch.randn(1, 4096), None)
    linear(torch.randn(2, 4096))
    before = resident()
    linear(torch.randn(30_000, 4096))
    grown = resident() - before
    for _ in range(300):
        linear(torch.randn(2, 4096))
    print(grown, resident() - before)
    """)
    grown, left = map(int, said.split())
    assert grown > 400 << 20
    assert left < 64 << 20


def test_a_fused_network_gives_back_what_one_large_batch_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.kernels.forward.ROWS_KEPT", 8)
    kernels = load_or_skip(None, 1)
    network, cache = make_network(KernelOps(kernels))
    embed = network._embed
    assert isinstance(embed, KernelEmbedding)
    forward = Forward(kernels, embed, network._layers, cache.layers, network.config.activation)
    few, many = one_sequence(2), one_sequence(60)
    found = forward(few).clone()
    forward(many)
    assert len(forward._hidden) >= 60
    for _ in range(300):
        assert torch.equal(forward(few), found)
    assert len(forward._hidden) == 8


def one_sequence(count: int) -> Batch:
    positions = torch.arange(count)
    tables = torch.arange(4, dtype=torch.int32)[None]
    starts = torch.tensor([0, count], dtype=torch.int32)
    return Batch(positions % 61, positions, positions, starts, starts[1:], tables, ())


# === Whatever they are given ===


def test_no_shape_is_read_that_is_not_there(kernels: Kernels) -> None:
    linear, _, _ = make_linear(kernels, (100, 77), Storage.FP32)
    norm = KernelNorm(kernels, torch.ones(8), torch.ones(8), 1e-5)
    cache = make_network(KernelOps(kernels))[1].layers[0]  # 40 wide
    wrong: list[Callable[[], object]] = [
        lambda: linear(torch.randn(3, 99)),
        lambda: linear(torch.randn(300)),
        lambda: linear(torch.randn(3, 100), residual=torch.randn(2, 77)),
        lambda: linear(torch.randn(3, 100), residual=torch.randn(3, 76)),
        lambda: linear.call(torch.randn(3, 100), torch.empty(3, 76)),
        lambda: PackedLinear(kernels, torch.randn(77, 100), torch.randn(76)),
        lambda: norm(torch.randn(3, 7)),
        lambda: KernelNorm(kernels, torch.ones(8), torch.ones(7), 1e-5),
        lambda: KernelEmbedding(kernels, linear, torch.randn(5, 99)),
        lambda: kernels.write_kv(torch.randn(2, 3 * 39), cache, torch.zeros(2, dtype=torch.int64)),
        lambda: kernels.write_kv(torch.randn(2, 3 * 40), cache, torch.zeros(3, dtype=torch.int64)),
        lambda: kernels.score(torch.randn(2, 9), torch.zeros(3, dtype=torch.int64), (1, 1, 1)),
        lambda: kernels.score(torch.randn(2, 9), torch.zeros(2, dtype=torch.int64), (10, 1)),
    ]
    for call in wrong:
        with pytest.raises(AssertionError):
            call()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_child_forked_in_the_middle_of_a_call_computes(threads: int) -> None:
    """Another thread may hold the lock, or be inside the gate, at that moment."""
    said = alone(f"""
    import os, signal, sys, threading, torch
    from model.kernels.layers import PackedLinear
    from model.kernels.library import load

    linear = PackedLinear(load(threads={threads}), torch.ones(64, 512), None)
    x, over = torch.ones(64, 512), threading.Event()

    def compute() -> None:
        while not over.is_set():
            linear(x)

    computing = threading.Thread(target=compute)
    computing.start()
    signal.alarm(60)
    right = 0
    for _ in range(60):
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            os._exit(not bool((linear(x) == 512).all()))
        right += os.waitpid(child, 0)[1] == 0
    over.set()
    computing.join()
    print(right)
    """)
    assert said == "60\n"


def alone(program: str) -> str:
    """What a Python of its own says that runs this."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


# === Loading ===


def test_no_level_is_chosen_on_a_machine_that_lacks_an_instruction_set_it_was_compiled_for() -> None:
    source = (Path(structs.__file__).parent / "kernels.c").read_text()
    compiled = {feature for found in re.findall(r'TARGET_BEGIN\("([^"]+)"\)', source) for feature in found.split(",")}
    assert compiled >= {"avx2", "fma", "f16c", "avx512f", "avx512vnni"}
    choosing = source[source.index("int kernels_best_level(void)") :].partition("\n}\n")[0]
    asked = {*re.findall(r'cpu_supports\("(\w+)"\)', choosing), *re.findall(r"has_(\w+)\(\)", choosing)}
    assert asked == compiled


def test_fewer_threads_than_asked_for_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_or_skip(None, threads=1)
    assert not caplog.records
    monkeypatch.setattr(Kernels, "set_threads", lambda *_: 2)
    load(threads=4)
    (said,) = caplog.records
    assert (said.levelname, said.asked, said.started) == ("WARNING", 4, 2)  # type: ignore[attr-defined]


def test_a_level_can_be_chosen_up_to_the_machine_s_best(monkeypatch: pytest.MonkeyPatch) -> None:
    best = load_or_skip(None, threads=1)
    assert load("portable", threads=1).describe() == "C kernels (portable)"
    assert KernelOps(load("portable", threads=1), Storage.INT8).describe() == "int8, C kernels (portable)"
    monkeypatch.setitem(LEVELS, "of a later machine", best.level + 1)
    with pytest.raises(KernelsUnavailableError, match="this machine has no of a later machine"):
        load("of a later machine", threads=1)


def test_kernels_of_another_version_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    load_or_skip(None, threads=1)
    monkeypatch.setattr(structs, "ABI", structs.ABI + 1)
    with pytest.raises(KernelsUnavailableError, match="built for another version; install again"):
        load(threads=1)


# === What to keep weights and the cache in ===

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "quantization", "described", "kv_dtype"),
    [
        (torch.float32, None, "fp32, C kernels", torch.float32),
        (torch.float16, None, "fp16, C kernels", torch.float16),
        (torch.float32, "int8", "int8, C kernels", torch.float16),
    ],
)
def test_formats(dtype: torch.dtype, quantization: str | None, described: str, kv_dtype: torch.dtype) -> None:
    load_or_skip(None, threads=1)
    ops = choose_ops(CPU, dtype, "portable", quantization)
    assert ops.describe() == f"{described} (portable)"
    assert choose_kv_dtype("auto", ops) == kv_dtype
    assert choose_kv_dtype("float32", ops) == torch.float32
    assert choose_kv_dtype("float16", ops) == torch.float16
    with pytest.raises(DeviceError, match="a KV cache of bfloat16 does not go with"):
        choose_kv_dtype("bfloat16", ops)


def test_without_the_kernels_weights_are_fp32_or_refused() -> None:
    assert choose_ops(CPU, torch.float32, "off").kv_dtypes == (torch.float32,)
    with pytest.raises(DeviceError, match="on a CPU, int8 weights need the C kernels: they are off"):
        choose_ops(CPU, torch.float32, "off", "int8")
    with pytest.raises(DeviceError, match="on a CPU, fp16 weights need the C kernels: they are off"):
        choose_ops(CPU, torch.float16, "off")
    with pytest.raises(DeviceError, match="quantization int8 runs on a CPU"):
        choose_ops(torch.device("cuda"), torch.bfloat16, "auto", "int8")


def test_a_start_without_the_kernels_warns_where_nobody_asked_for_that(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(level: str | None = None) -> None:
        raise KernelsUnavailableError("the C kernels were not built; install again with a C compiler")

    monkeypatch.setattr(loading, "load", load)
    cpu = torch.device("cpu")
    choose_ops(cpu, torch.float32, "off")
    assert not caplog.records
    choose_ops(cpu, torch.float32, "auto")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "install again with a C compiler" in caplog.records[0].__dict__["reason"]
