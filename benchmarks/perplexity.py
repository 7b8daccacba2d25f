"""A served model's perplexities, by its own prompt scoring: `python -m benchmarks.perplexity [MODEL] --text NAME=FILE`.

Everything is asked of `/v1/completions` with `echo`, `logprobs` and `max_tokens` 0, as a client would. A text is scored
by windows of a whole context, spread evenly, nothing given before a window; LAMBADA (Paperno et al., 2016) by the last
word of each passage, every token of it, with no stop-word filter.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.request import Request, urlopen

import numpy as np

import model
from benchmarks.machine import machine
from model.config import read_config
from model.tokenizer import Tokenizer, read_tokenizer
from model.training.data import read_documents
from server.load import started

AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens of a prompt from `start` on, each given all before it."""

    nats: float  # of all of them
    tokens: int
    greedy: bool  # each was the likeliest


class Scorer:
    def __init__(self, url: str) -> None:
        """url: with /v1."""
        self._url = f"{url}/completions"

    def score(self, ids: list[int], start: int = 1) -> Scored:
        body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0}
        with urlopen(Request(self._url, json.dumps(body).encode())) as answer:  # noqa: S310 - of our own server
            got: dict[str, Any] = json.load(answer)["choices"][0]["logprobs"]
        own, best = got["token_logprobs"][start:], got["top_logprobs"][start:]
        greedy = all(a == max(b.values()) for a, b in zip(own, best, strict=True))
        return Scored(-sum(own), len(own), greedy)

    def each(self, prompts: list[tuple[list[int], int]]) -> list[Scored]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda prompt: self.score(*prompt), prompts))


def windows(path: Path, tokenizer: Tokenizer, context: int, count: int) -> Iterator[list[int]]:
    ids = [token for text in read_documents(path) for token in [*tokenizer.encode(text), *tokenizer.eos_token_ids[:1]]]
    for begin in np.linspace(0, len(ids) - context, count).astype(int):
        yield ids[begin : begin + context]


def last_words(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    for line in path.read_text("utf-8").splitlines():
        before, _, word = json.loads(line)["text"].rpartition(" ")
        given = tokenizer.encode(before)
        yield given + tokenizer.encode(f" {word}"), len(given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path(model.__file__).parent / "default")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--lambada", type=Path, metavar="FILE", help='a JSON object a line, with "text"')
    parser.add_argument("--windows", type=int, default=64, help="of each text (%(default)s)")
    arguments = parser.parse_args()
    config = read_config(arguments.model)
    tokenizer = read_tokenizer(arguments.model, config.vocab_size, config.eos_token_ids)
    print(
        f"{machine()}; {time.strftime('%Y-%m-%d')}\n\n| text | tokens | loss, nats a token | perplexity |\n"
        + "| --- " * 4
        + "|"
    )
    with started(str(arguments.model), ["--log-level", "warning"]) as (server, _, _):
        scorer = Scorer(server.url)
        for name, _, file in (text.partition("=") for text in arguments.text):
            cut = windows(Path(file), tokenizer, config.n_positions, arguments.windows)
            scores = scorer.each([(window, 1) for window in cut])
            tokens, nats = sum(s.tokens for s in scores), sum(s.nats for s in scores)
            print(f"| {name} | {tokens:,} | {nats / tokens:.4f} | {math.exp(nats / tokens):.2f} |", flush=True)
        if arguments.lambada:
            scores = scorer.each(list(last_words(arguments.lambada, tokenizer)))
            perplexity, accuracy = math.exp(mean(s.nats for s in scores)), mean(s.greedy for s in scores)
            print(f"\nLAMBADA: {len(scores):,} words, perplexity {perplexity:,.1f} a word, accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
