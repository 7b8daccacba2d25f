"""What waits for its grammar holds up nothing else. The worker's loop, in this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from model.sampling_params import SamplingParams
from server.worker.__main__ import Worker
from server.worker.channel import WorkerChannel
from server.worker.messages import Abort, Sample, Start, Submit

PLAIN = Submit(SamplingParams(seed=1, max_tokens=6), [[1, 2]], [Sample(1, 0)])
GRAMMAR = SamplingParams(seed=1, max_tokens=40, grammar="start: /abc/")
WITH_GRAMMAR = Submit(GRAMMAR, [[3]], [Sample(2, 0), Sample(3, 0)])


@pytest.fixture
def worker(tiny: Path) -> Iterator[Worker]:
    ours, theirs = socket.socketpair()
    start = Start(
        model=str(tiny), eos_token_ids=[50256], device="cpu", dtype="float32", quantization=None,
        kv_cache_dtype="auto", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64, target_itl=None,
        block_size=16, kv_cache_bytes=1 << 20, gpu_utilization=None, deterministic=False, prefix_caching=True,
        kernels="auto", threads=1,
    )  # fmt: skip
    with ours, theirs:
        yield Worker(start, WorkerChannel(theirs))


def run(worker: Worker) -> int:
    """Steps until there is nothing to run. Returns how many there were."""
    steps = 0
    while worker._step():
        steps += 1
    return steps


def test_others_go_on_while_a_grammar_is_compiled(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    preparing: Future[None] = Future()
    monkeypatch.setattr(worker._grammars, "prepare", lambda _: preparing)
    worker.handle([WITH_GRAMMAR, PLAIN])
    worker._unpark()
    assert run(worker) == 6
    assert not worker._idle, "somebody waits"
    worker.handle([Abort([3])])
    preparing.set_result(None)
    worker._unpark()
    assert worker._scheduler.stats().waiting == 1, "the one that is left of two"
    assert run(worker) >= 1
    assert worker._idle


def test_what_is_compiled_already_does_not_wait(worker: Worker) -> None:
    worker._grammars.begin().result(60)
    preparing = worker._grammars.prepare("start: /abc/")
    assert preparing is not None
    preparing.result(60)
    worker.handle([WITH_GRAMMAR])
    assert worker._scheduler.stats().waiting == 2
    assert run(worker) >= 1
