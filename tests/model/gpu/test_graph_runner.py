"""The GPU runner's logic (ladder, padding, buffers, steps launched ahead) on a CPU, against the plain runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standin import StandIn
from transformers import GPT2LMHeadModel

from model.config import read_config
from model.gpt2 import GPT2
from model.gpu import cuda
from model.gpu import ops as gpu
from model.gpu.attention import GatheredAttention, PagedAttention
from model.gpu.ops import GpuOps
from model.gpu.runner import GraphRunner
from model.gpu.sampling import Draw
from model.kv_cache import KVCache
from model.runner import Runner
from model.sampling_params import SamplingParams
from model.step import StepPlan
from model.weights import read_weights
from server.worker.block_pool import BlockPool
from server.worker.messages import Add, FinishReason, SequenceOutput
from server.worker.pipeline import Pipeline, StepRunner
from server.worker.scheduler import Scheduler

CPU = torch.device("cpu")
BLOCKS, BLOCK_SIZE, CONTEXT, SEATS, BUDGET = 40, 16, 128, 6, 48
Made = Callable[..., tuple[Path, GPT2LMHeadModel]]


def network_of(directory: Path, attention: PagedAttention, dtype: torch.dtype) -> GPT2:
    config = read_config(directory)
    ops = GpuOps(CPU, dtype, attention, deterministic=False)
    with torch.inference_mode():
        return GPT2(config, read_weights(directory, config), ops)


@pytest.fixture(scope="module")
def network(make_checkpoint: Made) -> GPT2:
    """In float64, or near ties would fall out one way in one batch and the other way in another."""
    return network_of(make_checkpoint()[0], GatheredAttention(), torch.float64)


def plain_runner(network: GPT2, dtype: torch.dtype = torch.float64) -> tuple[Runner, KVCache]:
    cache = KVCache(network.config, BLOCKS + 1, BLOCK_SIZE, dtype, CPU)
    return Runner(network, cache, CPU, CONTEXT), cache


def graph_runner(
    network: GPT2, device: StandIn, dtype: torch.dtype = torch.float64, draw: Draw | None = None
) -> GraphRunner:
    plain, cache = plain_runner(network, dtype)
    runner = GraphRunner(
        plain, network, cache, device,
        max_rows=BUDGET, max_seqs=SEATS, max_blocks=CONTEXT // BLOCK_SIZE, scratch_block=BLOCKS, draw=draw,
    )  # fmt: skip
    runner.capture()
    return runner


class Drive:
    """The worker's loop without a worker."""

    def __init__(self, network: GPT2, runner: StepRunner) -> None:
        self.scheduler = Scheduler(
            BlockPool(BLOCKS, BLOCK_SIZE, enable_prefix_caching=True),
            max_num_seqs=SEATS,
            max_num_batched_tokens=BUDGET,
            max_model_len=CONTEXT,
            eos_token_ids=network.config.eos_token_ids,
        )
        self.pipeline = Pipeline(self.scheduler, runner)
        self.said: dict[int, list[SequenceOutput]] = {}

    def run(self, requests: list[tuple[list[int], SamplingParams]], together: int, leave: frozenset[int]) -> None:
        """Requests arrive `together` at a time, a step apart; those in `leave` are aborted after three outputs."""
        waiting = list(enumerate(requests))
        while True:
            for id_, (prompt, params) in waiting[:together]:
                self.said[id_] = []
                self.scheduler.add(Add(id=id_, prompt=prompt, params=params))
            del waiting[:together]
            landed = self.pipeline.step()
            if landed is None and not waiting:
                break
            for output in landed.outputs if landed else ():
                self.said[output.id].append(output)
                if output.id in leave and len(self.said[output.id]) == 3:
                    self.scheduler.abort(output.id)
        self.scheduler.check()
        assert self.scheduler.idle
        assert self.scheduler.pool.num_used == 0


def params_of() -> st.SearchStrategy[SamplingParams]:
    def build(**fields: Any) -> SamplingParams:
        return SamplingParams(**fields)

    return st.builds(
        build,
        seed=st.integers(0, 1 << 40),
        max_tokens=st.integers(1, 24),
        temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
        top_p=st.sampled_from([1.0, 0.9, 0.3]),
        top_k=st.sampled_from([None, 1, 5, 300]),
        min_p=st.sampled_from([0.0, 0.05]),
        logprobs=st.sampled_from([None, 0, 3]),
        ignore_eos=st.booleans(),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.8]),  # left to the plain runner
        prompt_logprobs=st.sampled_from([None, None, None, 2]),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 501), min_size=1, max_size=70), params_of()), min_size=1, max_size=12),
    st.integers(1, 4),
    st.frozensets(st.integers(0, 11), max_size=3),
)
def test_steps_launched_ahead_say_what_steps_taken_in_turn_say(
    network: GPT2, requests: list[tuple[list[int], SamplingParams]], together: int, leave: frozenset[int]
) -> None:
    device = StandIn()
    ahead, in_turn = Drive(network, graph_runner(network, device)), Drive(network, plain_runner(network)[0])
    for drive in (ahead, in_turn):
        drive.run(requests, together, leave)
    for id_, expected in in_turn.said.items():
        said = ahead.said[id_]
        count = 3 if id_ in leave else len(expected)  # how much an aborted one says after its third depends on timing
        assert [each.token for each in said[:count]] == [each.token for each in expected[:count]]
        assert [each.finish for each in said[:count]] == [each.finish for each in expected[:count]]
        for mine, other in zip(said[:count], expected[:count], strict=True):
            assert (mine.logprobs is None) == (other.logprobs is None)
            if mine.logprobs is not None and other.logprobs is not None:
                assert mine.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
                assert mine.logprobs.rank == other.logprobs.rank
                assert [i for i, _ in mine.logprobs.top] == [i for i, _ in other.logprobs.top]


GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=30, ignore_eos=True)


def test_every_decode_step_is_a_replay_and_only_one_step_is_waited_for_at_a_time(network: GPT2) -> None:
    device = StandIn()
    runner = graph_runner(network, device)
    assert (device.recorded, runner.graphs) == (4, 4)  # 1, 2, 4 and 6
    drive = Drive(network, runner)
    drive.run([([1, 2, 3], GREEDY), ([4, 5, 6, 7, 8], GREEDY), ([9], GREEDY)], together=3, leave=frozenset())
    assert device.replayed == 29  # of 30 tokens the prompts' step gives the first
    assert device.waited == 30
    assert [each[-1].finish for each in drive.said.values()] == [FinishReason.LENGTH] * 3


def test_a_step_is_launched_before_the_one_before_it_has_come_home(network: GPT2) -> None:
    device = StandIn()
    drive = Drive(network, graph_runner(network, device))
    drive.scheduler.add(Add(id=1, prompt=[1, 2, 3], params=GREEDY))
    landed = drive.pipeline.step()
    assert landed is not None
    assert len(landed.outputs) == 1
    assert (device.waited, device.replayed) == (1, 1)  # the prompt's step is home, the first decode step is under way
    drive.pipeline.step()
    assert (device.waited, device.replayed) == (2, 2)


def test_what_the_device_cannot_decide_waits_for_what_is_queued(network: GPT2) -> None:
    device = StandIn()
    drive = Drive(network, graph_runner(network, device))
    drive.run([([1, 2, 3], replace(GREEDY, repetition_penalty=1.3)), ([4, 5], GREEDY)], 1, frozenset())
    plain = Drive(network, plain_runner(network)[0])
    plain.run([([1, 2, 3], replace(GREEDY, repetition_penalty=1.3)), ([4, 5], GREEDY)], 1, frozenset())
    assert {i: [o.token for o in said] for i, said in drive.said.items()} == {
        i: [o.token for o in said] for i, said in plain.said.items()
    }


@pytest.mark.skipif(not gpu.HAS_TRITON, reason="there is no Triton for this system")
@pytest.mark.skipif(cuda.available(), reason="Triton's interpreter is needed, which a GPU's Triton is not")
def test_graphs_of_tritons_kernels_say_what_the_plain_runner_says(make_checkpoint: Made, network: GPT2) -> None:
    fused = network_of(make_checkpoint()[0], gpu.TritonAttention(deterministic=False), torch.float32)
    how = [
        replace(GREEDY, max_tokens=5),
        SamplingParams(seed=4, max_tokens=5),
        SamplingParams(seed=5, max_tokens=5, top_k=9),
    ]
    requests = [(list(range(1, 15 + 3 * i)), params) for i, params in enumerate(how)]
    device = StandIn()
    ahead, in_turn = (
        Drive(network, graph_runner(fused, device, torch.float32, gpu.DRAW)),
        Drive(network, plain_runner(network)[0]),
    )
    for drive in (ahead, in_turn):
        drive.run(requests, together=2, leave=frozenset())
    assert device.replayed > 0
    tokens = [{i: [each.token for each in said] for i, said in drive.said.items()} for drive in (ahead, in_turn)]
    assert tokens[0] == tokens[1]


def test_streams_are_replayed_beside_one_that_the_device_cannot_decide(network: GPT2) -> None:
    device = StandIn()
    drive, plain = Drive(network, graph_runner(network, device)), Drive(network, plain_runner(network)[0])
    penalised = replace(GREEDY, max_tokens=9, repetition_penalty=1.3)
    requests = [([1, 2, 3], penalised), *(([4 + i, 5], replace(GREEDY, max_tokens=9)) for i in range(3))]
    for each in (drive, plain):
        each.run(requests, together=4, leave=frozenset())
    assert device.replayed == 8  # in every step but the first, for the three
    assert {i: [each.token for each in said] for i, said in drive.said.items()} == {
        i: [each.token for each in said] for i, said in plain.said.items()
    }


def test_a_sequence_that_joins_with_one_token_to_compute_comes_after_the_replay(network: GPT2) -> None:
    """It may read a block that another one completes in the same step; a decode step's kernels do not wait for that."""
    device = StandIn()
    runner = graph_runner(network, device)
    scheduler = Drive(network, runner).scheduler

    def plan_of(id_: int, prompt: list[int]) -> StepPlan:
        scheduler.add(Add(id=id_, prompt=prompt, params=replace(GREEDY, max_tokens=3)))
        plan = scheduler.schedule()
        assert plan is not None
        return plan

    first = list(range(100, 100 + BLOCK_SIZE - 1))
    plan = plan_of(1, first)
    result = runner.launch(plan).result()
    scheduler.update(plan, result)
    assert result.sampled[0].token is not None
    plan = plan_of(2, [*first, result.sampled[0].token, 7])
    assert plan.decodes
    assert [chunk.start for chunk in plan.chunks] == [BLOCK_SIZE - 1, BLOCK_SIZE]  # the one fills what the other shares
    runner.launch(plan)
    assert device.replayed == 1  # of the one that was there alone


def test_streams_are_replayed_beside_the_prompt_of_another(network: GPT2) -> None:
    device = StandIn()
    drive = Drive(network, graph_runner(network, device))
    plain = Drive(network, plain_runner(network)[0])
    requests = [([1 + i, 2, 3], replace(GREEDY, max_tokens=6)) for i in range(4)]
    for each in (drive, plain):
        each.run(requests, together=1, leave=frozenset())
    assert device.replayed == 9  # in all ten steps but the first; the prompts of three arrive with other steps
    assert {i: [each.token for each in said] for i, said in drive.said.items()} == {
        i: [each.token for each in said] for i, said in plain.said.items()
    }


def test_what_is_recorded_leaves_no_seat_taken(network: GPT2) -> None:
    drive = Drive(network, graph_runner(network, StandIn()))
    drive.run([([i, i + 1], GREEDY) for i in range(2 * SEATS)], together=SEATS, leave=frozenset())
    assert all(len(said) == 30 for said in drive.said.values())


def test_padding_writes_to_the_scratch_block_alone(network: GPT2) -> None:
    device = StandIn()
    plain, cache = plain_runner(network)
    runner = GraphRunner(
        plain, network, cache, device,
        max_rows=BUDGET, max_seqs=SEATS, max_blocks=CONTEXT // BLOCK_SIZE, scratch_block=BLOCKS,
    )  # fmt: skip
    for layer in cache.layers:
        layer.keys.fill_(3.0)
        layer.values.fill_(3.0)
    runner.capture()
    drive = Drive(network, runner)
    drive.run([([i, i + 1], GREEDY) for i in range(5)], together=5, leave=frozenset())  # five rows on a rung of six
    touched = {
        block for layer in cache.layers for block in range(BLOCKS + 1) if not bool((layer.keys[block] == 3.0).all())
    }
    assert BLOCKS in touched
    assert len(touched) == 5 * 2 + 1  # of 32 tokens each, two blocks


def test_rungs_for_which_there_is_no_time_are_left_out(network: GPT2) -> None:
    plain, cache = plain_runner(network)
    device = StandIn()
    runner = GraphRunner(
        plain, network, cache, device,
        max_rows=BUDGET, max_seqs=SEATS, max_blocks=CONTEXT // BLOCK_SIZE, scratch_block=BLOCKS,
    )  # fmt: skip
    told: list[tuple[int, int]] = []
    runner.capture(lambda done, of, seconds: told.append((done, of)), seconds=0.0)
    assert told == [(1, 4)]
    drive = Drive(network, runner)
    drive.run([([1, 2], GREEDY)], together=1, leave=frozenset())
    assert device.replayed == 29  # one stream is padded to the only rung
