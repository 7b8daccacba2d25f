"""What fewer bits cost in quality: `python -m benchmarks.quality [MODEL] --text NAME=FILE …`.

Perplexity of each text in fp32, fp16 and int8, in windows of a whole context that do not overlap; and of the smaller
formats, the Kullback-Leibler divergence from fp32 and how often both think the same token the most likely.
"""

from __future__ import annotations

import argparse
import lzma
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import model
from benchmarks.engine import BLOCK_SIZE
from benchmarks.formats import FORMATS, Loaded, load
from model.batch import Batch
from model.config import read_config
from model.kv_cache import KVCache
from model.tokenizer import read_tokenizer

CPU = torch.device("cpu")
ROWS = 8  # of logits at once


class Scorer:
    """One network, and a cache for one window."""

    def __init__(self, loaded: Loaded) -> None:
        self.network = loaded.network
        config = self.network.config
        self._blocks = -(-config.n_positions // BLOCK_SIZE)
        self._cache = KVCache(config, self._blocks, BLOCK_SIZE, loaded.kv_dtype, CPU)

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens: (n,). Returns (n, n_embd), of its own."""
        positions = torch.arange(len(tokens))
        count = torch.tensor([len(tokens)], dtype=torch.int32)
        batch = Batch(
            tokens=tokens,
            positions=positions,
            slots=positions,
            query_starts=torch.cat([torch.zeros(1, dtype=torch.int32), count]),
            contexts=count,
            block_tables=torch.arange(self._blocks, dtype=torch.int32)[None],
            spans=((len(tokens), len(tokens)),),
        )
        return self.network.forward(batch, self._cache).clone()


@dataclass
class Sums:
    """Over all tokens of a text."""

    nats: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    tokens: int = 0


@torch.inference_mode()
def compare(scorers: dict[str, Scorer], ids: list[int], context: int) -> dict[str, Sums]:
    """scorers: fp32 first."""
    sums = {name: Sums() for name in scorers}
    for start in range(0, len(ids) - 1, context):
        window = torch.tensor(ids[start : start + context + 1])
        hidden = {name: scorer.hidden(window[:-1]).split(ROWS) for name, scorer in scorers.items()}
        for part, targets in enumerate(window[1:].split(ROWS)):
            exact = likely = base = best = torch.empty(0)
            for name, scorer in scorers.items():
                logits, of = scorer.network.logits(hidden[name][part]), sums[name]
                scores = scorer.network.score(logits, targets, [1] * len(targets))
                log_sum = logits.gather(1, targets[:, None])[:, 0] - scores.own
                if of is sums["fp32"]:
                    exact, base, best = logits, log_sum, scores.ids
                    likely = (logits - log_sum[:, None]).exp_()
                of.nats -= scores.own.double().sum().item()
                of.divergence += torch.linalg.vecdot(likely, exact - logits).sub(base - log_sum).double().sum().item()
                of.agreed += int((best == scores.ids).sum())
                of.tokens += len(targets)
    return sums


def read(path: Path) -> str:
    return lzma.open(path, "rt", encoding="utf-8").read() if path.suffix == ".xz" else path.read_text("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path(model.__file__).parent / "default")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="UTF-8, .xz or plain")
    parser.add_argument("--tokens", type=int, help="of each text, from its beginning; default: all")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    config = read_config(arguments.model)
    tokenizer = read_tokenizer(arguments.model, config.vocab_size, config.eos_token_ids)
    scorers = {name: Scorer(load(arguments.model, name, arguments.threads)) for name in FORMATS}
    print("| text | format | tokens | perplexity | to fp32 | KL, nats | same greedy token |\n" + "| --- " * 7 + "|")
    for name, _, path in (text.partition("=") for text in arguments.text):
        ids = tokenizer.encode(read(Path(path)))[: arguments.tokens]
        sums = compare(scorers, ids, config.n_positions)
        base = sums["fp32"].nats / sums["fp32"].tokens
        for format_, of in sums.items():
            nats = of.nats / of.tokens
            print(
                f"| {name} | {format_} | {of.tokens} | {math.exp(nats):.3f} | {100 * math.expm1(nats - base):+.3f} % "
                f"| {of.divergence / of.tokens:.6f} | {100 * of.agreed / of.tokens:.2f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
