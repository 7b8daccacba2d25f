"""What a draft model is worth to one stream: `python -m benchmarks.drafts DRAFT --text FILE [--model MODEL]`.

Two servers, with and without the draft, asked in turn to go on with the same beginnings of a text that neither has
seen, greedily and sampled. Tokens a second of each, and how many of the guesses were right.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import model
from benchmarks.machine import machine
from benchmarks.perplexity import windows
from model.config import read_config
from model.tokenizer import read_tokenizer
from server.load import Server, closed_loop, started

BEGINNING = 128  # tokens given
TOKENS = 128  # tokens asked for
COUNTERS = ("draft", "accepted")


def guesses(server: Server) -> list[float]:
    """Guesses so far, and those that were right."""
    with urlopen(server.url.removesuffix("v1") + "metrics") as answer:  # noqa: S310 - of our own server
        text = answer.read().decode()
    found = (
        re.findall(rf"^gpt2_spec_decode_num_{name}_tokens_total\S* (\S+)$", text, re.MULTILINE) for name in COUNTERS
    )
    return [sum(map(float, values)) for values in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--model", type=Path, default=Path(model.__file__).parent / "default")
    parser.add_argument("--text", type=Path, required=True, help="to go on with")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = read_config(arguments.model)
    tokenizer = read_tokenizer(arguments.model, config.vocab_size, config.eos_token_ids)
    prompts = list(windows(arguments.text, tokenizer, BEGINNING, arguments.prompts))
    quiet = ["--log-level", "warning", "--no-enable-prefix-caching"]
    drafted = [*quiet, "--speculative-method", "model", "--speculative-model", str(arguments.draft)]
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; one stream, medians of {arguments.rounds} rounds\n")
    print("| temperature | tokens/s | with the draft | ratio | guesses that were right |\n" + "| --- " * 5 + "|")
    with (
        started(str(arguments.model), quiet) as (plain, _, _),
        started(str(arguments.model), drafted) as (guessing, _, _),
    ):
        for temperature in (0.0, 1.0):
            bodies: list[dict[str, Any]] = [
                {"prompt": ids, "max_tokens": TOKENS, "temperature": temperature, "seed": i, "ignore_eos": True}
                for i, ids in enumerate(prompts)
            ]
            before = guesses(guessing)
            pairs = [
                [asyncio.run(closed_loop(each, bodies, 1)).tokens_per_second for each in (plain, guessing)]
                for _ in range(arguments.rounds)
            ]
            made, right = (after - first for after, first in zip(guesses(guessing), before, strict=True))
            without, with_ = (median(rates) for rates in zip(*pairs, strict=True))
            ratio = median(b / a for a, b in pairs)
            share = f"{right / made:.0%} of {made:,.0f}" if made else "none made"
            print(f"| {temperature:g} | {without:.0f} | {with_:.0f} | {ratio:.2f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
