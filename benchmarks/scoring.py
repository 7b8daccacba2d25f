"""Scoring prompts: `python -m benchmarks.scoring MODEL [-- FLAGS]`, ours over HTTP beside a plain transformers forward.

512-token texts, `echo` with `logprobs`, no token generated, against `GPT2LMHeadModel(ids).logits` of the same texts in
this process on as many threads: what a script without a server would do, before it even takes a log-softmax. In turn.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import GPT2LMHeadModel

from benchmarks.machine import machine, resident_mib
from server.load import started

TOKENS = 512
TEXTS = 8


def texts(seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(50256) for _ in range(TOKENS)] for _ in range(TEXTS)]


def score(url: str, prompt: list[int]) -> float:
    """The first scored token's log-probability."""
    body = json.dumps({"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}).encode()
    request = urllib.request.Request(f"{url}/completions", body)  # noqa: S310 - our own server
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        decoded: dict[str, Any] = json.load(answer)
    return float(decoded["choices"][0]["logprobs"]["token_logprobs"][1])


def ours(url: str, prompts: list[list[int]], at_once: int) -> float:
    """Tokens a second."""
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda prompt: score(url, prompt), prompts))
    return TOKENS * TEXTS / (time.perf_counter() - began)


@torch.inference_mode()
def theirs(network: GPT2LMHeadModel, prompts: list[list[int]]) -> float:
    began = time.perf_counter()
    for prompt in prompts:
        network(torch.tensor([prompt])).logits  # noqa: B018 - computed, as a script would
    return TOKENS * TEXTS / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="after --: flags for our server")
    arguments = parser.parse_args()
    network = GPT2LMHeadModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    found: dict[str, list[float]] = {"ours, one text at a time": [], "ours, four at once": [], "transformers": []}
    with started(str(arguments.model), arguments.flags) as (server, seconds, pid):
        url, process = server.url, psutil.Process(pid)
        score(url, texts(0)[0])
        theirs(network, texts(0)[:1] * TEXTS)
        before = resident_mib(process)
        for turn in range(arguments.rounds):
            prompts = texts(turn + 1)
            found["ours, one text at a time"].append(ours(url, prompts[:TEXTS], 1))
            found["transformers"].append(theirs(network, prompts))
            found["ours, four at once"].append(ours(url, texts(100 + turn), 4))
        grown = resident_mib(process) - before
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; {TOKENS}-token texts; median of {arguments.rounds} rounds")
    base = median(found["transformers"])
    for name, rates in found.items():
        print(f"{name:<26}{median(rates):8.0f} tokens/s{median(rates) / base:7.2f}x")
    print(f"ready after {seconds:.1f} s, {before:.0f} MiB resident after one text")
    print(f"our processes grew by {grown:.0f} MiB, the KV cache's first use included")


if __name__ == "__main__":
    main()
