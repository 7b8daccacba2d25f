"""What a worker is made of, each part from the few numbers of `Start` it needs. Nothing here runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import read_config
from model.errors import DeviceError
from model.gpt2 import GPT2
from model.gpu import cuda
from model.gpu.runner import GraphRunner, Recorded
from model.grammar import Grammars, Vocabulary
from model.kernels.ops import KernelOps
from model.kv_cache import KVCache
from model.loading import choose_device, choose_dtype, choose_kv_dtype, load_model
from model.ops import Ops
from model.runner import Runner
from model.speculative import Drafter, DraftModel, PromptLookup
from model.tokenizer import read_tokenizer
from model.variants import Variants
from model.weights import Progress
from server.worker.block_pool import BlockPool
from server.worker.memory import pool_size
from server.worker.messages import Start
from server.worker.scheduler import Scheduler
from server.worker.speculation import SpeculationController

DRAFT_TOKENS = 8192  # that a draft guesses among: of GPT-2's, the most likely next one is among them 97 times of 100


@dataclass(frozen=True, slots=True)
class Networks:
    """The weights, on their device."""

    device: torch.device
    kv_dtype: torch.dtype
    network: GPT2
    draft: GPT2 | None
    draft_cost: float  # of one of the draft's steps, as a share of the network's: what it reads
    ops: Ops
    backend: str

    @property
    def all(self) -> list[GPT2]:
        return [self.network] if self.draft is None else [self.network, self.draft]


def load_networks(start: Start, progress: Progress | None = None) -> Networks:
    """progress: told the share of the model's weights that was read. Raises ModelError."""
    torch.set_num_threads(start.threads)
    device = choose_device(start.device)
    dtype = choose_dtype(start.dtype, device)
    formats = device, dtype, start.kernels
    exact = start.deterministic
    ends = start.eos_token_ids
    network, ops = load_model(
        Path(start.model), *formats, start.quantization, deterministic=exact, eos_token_ids=ends, progress=progress
    )
    draft, cost = None, 0.0
    if start.draft_model:  # its mistakes are found, so it is kept in the fewest bits there are
        fewest = "int8" if isinstance(ops, KernelOps) else start.quantization
        directory = Path(start.draft_model)
        draft, its_ops = load_model(
            directory, *formats, fewest, deterministic=exact, eos_token_ids=ends, head_tokens=DRAFT_TOKENS
        )
        cost = draft.parameters_read * its_ops.weight_bytes / (network.parameters_read * ops.weight_bytes)
    if isinstance(ops, KernelOps):  # they have threads of their own, with which PyTorch's would fight for the cores
        torch.set_num_threads(1)
    return Networks(
        device, choose_kv_dtype(start.kv_cache_dtype, ops), network, draft, cost, ops, f"{device}, {ops.describe()}"
    )


def count_blocks(start: Start, networks: Networks) -> int:
    """Raises DeviceError where a GPU has no room for one context."""
    on_gpu = networks.device.type == "cuda" and start.gpu_utilization is not None
    allowed = cuda.pool_bytes(networks.device, start.gpu_utilization or 1.0) if on_gpu else start.kv_cache_bytes
    return pool_size(
        kv_cache_bytes=max(allowed, 0),
        bytes_per_token=sum(each.config.kv_bytes_per_token(networks.kv_dtype.itemsize) for each in networks.all),
        block_size=start.block_size,
        max_num_seqs=start.max_num_seqs,
        max_model_len=start.max_model_len,
    )


def make_variants(start: Start, networks: Networks) -> Variants:
    return Variants(networks.network, networks.ops, start.variant_bytes, Path(start.model))


def make_grammars(start: Start) -> Grammars:
    return Grammars(lambda: _vocabulary(start))


def make_runner(
    start: Start,
    networks: Networks,
    num_blocks: int,
    variants: Variants,
    grammars: Grammars,
    recorded: Recorded | None = None,
) -> Runner | GraphRunner:
    """With KV pools of its own, all zeros. recorded: told of each CUDA graph.

    Raises DeviceError where a GPU has no room for the pools.
    """
    try:
        runner = _make_runner(start, networks, num_blocks, variants, grammars)
        if isinstance(runner, GraphRunner):
            runner.capture(recorded)
        return runner
    except cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"{cuda.describe(networks.device)} has too little free memory for a KV cache of {num_blocks} blocks; "
            "a lower --gpu-memory-utilization or --kv-cache-gib asks for less"
        ) from error


def _make_runner(
    start: Start, networks: Networks, num_blocks: int, variants: Variants, grammars: Grammars
) -> Runner | GraphRunner:
    graphs = networks.device.type == "cuda" and not start.drafts  # guesses are verified by the plain runner

    def make_cache(network: GPT2) -> KVCache:  # with graphs, one block more: where rows that pad a batch write
        return KVCache(network.config, num_blocks + graphs, start.block_size, networks.kv_dtype, networks.device)

    drafter: Drafter | None = None
    if start.drafts:
        draft = networks.draft
        drafter = PromptLookup() if draft is None else DraftModel(draft, make_cache(draft), networks.device)
    network, cache = networks.network, make_cache(networks.network)
    plain = Runner(
        network,
        cache,
        networks.device,
        start.max_model_len,
        drafter=drafter,
        grammars=grammars,
        variants=variants,
    )
    if not graphs:
        return plain
    from model.gpu.ops import DRAW  # noqa: PLC0415  imports Triton, which a CPU needs nothing of

    return GraphRunner(
        plain,
        network,
        cache,
        cuda.Cuda(networks.device),
        max_rows=start.max_num_batched_tokens,
        max_seqs=start.max_num_seqs,
        max_blocks=-(-start.max_model_len // start.block_size),
        scratch_block=num_blocks,
        draw=DRAW,
    )


def make_scheduler(
    start: Start, networks: Networks, num_blocks: int, speculation: SpeculationController | None
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, start.block_size, enable_prefix_caching=start.prefix_caching),
        max_num_seqs=start.max_num_seqs,
        max_num_batched_tokens=start.max_num_batched_tokens,
        max_model_len=start.max_model_len,
        eos_token_ids=start.eos_token_ids,
        speculation=speculation,
    )


def make_speculation(start: Start, networks: Networks) -> SpeculationController | None:
    return SpeculationController(start.drafts, cost=networks.draft_cost) if start.drafts else None


def _vocabulary(start: Start) -> Vocabulary:
    config = read_config(Path(start.model))
    return Vocabulary(read_tokenizer(Path(start.model), config.vocab_size, start.eos_token_ids, forced=True))
