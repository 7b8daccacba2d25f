"""What each sampling field costs: `python -m benchmarks.features [MODEL] [--streams 1 8 32] [--level avx2]`.

In one process, without HTTP: the worker's parts decode the same prompts with the field and without it (temperature 1),
in turn and several times over. The rate is the median of the pairs' ratios; the CPU milliseconds a token are medians.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

import model
from benchmarks.engine import Engine, Way
from benchmarks.formats import FORMATS
from benchmarks.machine import machine
from model.dry import DryParams
from model.gpt2 import GPT2
from model.kernels.library import LEVELS
from model.loading import load_model
from model.tokenizer import Tokenizer, read_tokenizer

TEXT = (
    "The harbour was quiet when the first boats came in. Nobody on the quay had slept, for the storm had taken two of "
    "the masts and most of the roof of the old customs house, and what was left of it lay in the road. "
)
PLAIN: dict[str, Any] = {"temperature": 1.0}
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7": {"temperature": 0.7},
    "top_p 0.95": {"top_p": 0.95},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 40": {"top_k": 40},
    "top_k 300": {"top_k": 300},
    "top_k 5000": {"top_k": 5000},
    "min_p 0.05": {"min_p": 0.05},
    "typical_p 0.9": {"typical_p": 0.9},
    "xtc 0.5": {"xtc_probability": 0.5},
    "llama.cpp's default": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "typical_p 0.9, top_p 0.95": {"typical_p": 0.9, "top_p": 0.95},
    "presence and frequency": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "repetition 1.2": {"repetition_penalty": 1.2},
    "dry 0.8": {"dry": DryParams(multiplier=0.8)},
    "logit_bias of 300": {"logit_bias": tuple((i * 7, 0.5) for i in range(300))},
    "1,000 allowed ids": {"allowed_token_ids": tuple(range(200, 1200))},
    "40,000 allowed ids": {"allowed_token_ids": tuple(range(40_000))},
    "bad words": {"bad_words": tuple((i, i + 1) for i in range(200))},
    "min_tokens": {"min_tokens": 900},
    "logprobs 5": {"logprobs": 5},
    "logprobs 20": {"logprobs": 20},
    "top_p 0.95, logprobs 5, frequency": {"top_p": 0.95, "logprobs": 5, "frequency_penalty": 0.3},
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a field, beside the same streams without it."""

    name: str
    streams: int
    rate: float  # with / without, of tokens a second
    without: float  # CPU milliseconds a token
    with_: float


def decode(
    network: GPT2, kv_dtype: torch.dtype, prompts: list[list[int]], tokens: int, fields: dict[str, Any]
) -> tuple[float, float]:
    """Seconds and CPU seconds a token of streams that decode side by side; their prompts are computed before."""
    engine = Engine(network, torch.device("cpu"), Way(kv_dtype=kv_dtype))
    ids = [engine.add(prompt, tokens, **fields) for prompt in prompts]
    while not engine.outputs[ids[-1]]:
        engine.step()
    done = sum(len(engine.outputs[id_]) for id_ in ids)
    began, cpu_began = perf_counter(), process_time()
    while engine.step():
        pass
    made = sum(len(engine.outputs[id_]) for id_ in ids) - done
    return (perf_counter() - began) / made, (process_time() - cpu_began) / made


class Bench:
    def __init__(self, network: GPT2, kv_dtype: torch.dtype, tokenizer: Tokenizer, rounds: int, tokens: int) -> None:
        self._network = network
        self._kv_dtype = kv_dtype
        self._prompt = tokenizer.encode(TEXT)
        self._rounds = rounds
        self._tokens = tokens

    def cost(self, name: str, fields: dict[str, Any], streams: int) -> Cost:
        prompts = [self._prompt[i % 16 :] for i in range(streams)]
        pairs = []
        for _ in range(self._rounds):
            without = decode(self._network, self._kv_dtype, prompts, self._tokens, PLAIN)
            pairs.append((without, decode(self._network, self._kv_dtype, prompts, self._tokens, {**PLAIN, **fields})))
        return Cost(
            name=name,
            streams=streams,
            rate=median(without[0] / with_[0] for without, with_ in pairs),
            without=1e3 * median(without[1] for without, _ in pairs),
            with_=1e3 * median(with_[1] for _, with_ in pairs),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=Path(model.__file__).parent / "default")
    parser.add_argument("--format", choices=list(FORMATS), default="int8")
    parser.add_argument("--level", choices=list(LEVELS), help="instruction set; the machine's best without it")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", nargs="+", default=list(FEATURES), choices=list(FEATURES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, quantization = FORMATS[arguments.format]
    network, ops = load_model(
        arguments.model, torch.device("cpu"), dtype, kernels=arguments.level or "auto", quantization=quantization
    )
    torch.set_num_threads(1)
    bench = Bench(
        network,
        ops.kv_dtypes[0],
        read_tokenizer(arguments.model, network.config.vocab_size, network.config.eos_token_ids),
        arguments.rounds,
        arguments.tokens,
    )
    print(f"{ops.describe()}, {arguments.threads} thread(s), {machine()}; rate with / without, CPU ms a token")
    costs = []
    for name in arguments.only:
        row = [bench.cost(name, FEATURES[name], streams) for streams in arguments.streams]
        print(
            f"{name:<36}" + "".join(f"{c.streams:>5}: {c.rate:5.2f}  {c.without:6.3f} -> {c.with_:6.3f}" for c in row),
            flush=True,
        )
        costs += [{"name": c.name, "streams": c.streams, "rate": c.rate, "cpu_ms": [c.without, c.with_]} for c in row]
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "kernels": ops.describe(), "costs": costs}, indent=1)
        )


if __name__ == "__main__":
    main()
