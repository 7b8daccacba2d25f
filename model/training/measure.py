"""Measures a checkpoint on held-out text: perplexity, and LAMBADA's last words.

`python -m model.training.measure MODEL --text FILE --lambada FILE`
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from model.tokenizer import Tokenizer, read_tokenizer
from model.training.checkpoint import load_network
from model.training.data import read_documents
from model.training.loss import linear_cross_entropy
from model.training.network import Network


@torch.no_grad()
def mean_loss(network: Network, tokens: npt.NDArray[np.int64], stride: int) -> float:
    """Nats a token of `tokens[1:]`, in windows of a whole context that move by `stride`.

    Every token after the first window is given at least a context less `stride` of what comes before it.
    """
    context = network.config.n_positions
    total, scored = 0.0, 1
    for begin in range(0, len(tokens), stride):
        window = torch.from_numpy(tokens[begin : begin + context + 1])
        fresh = begin + len(window) - scored  # targets that no earlier window scored
        if fresh <= 0:
            break
        hidden = network(window[:-1].unsqueeze(0))[0, -fresh:]
        total += float(linear_cross_entropy(hidden, network.head.detach(), window[-fresh:])) * fresh
        scored += fresh
    return total / (len(tokens) - 1)


def spread_loss(network: Network, tokens: npt.NDArray[np.int64], windows: int) -> float:
    """Nats a token over that many windows of a whole context, spread evenly: a quick look at a long text."""
    context = network.config.n_positions
    begins = np.linspace(0, len(tokens) - context - 1, windows).astype(np.int64)
    return float(np.mean([mean_loss(network, tokens[begin : begin + context + 1], context) for begin in begins]))


@dataclass(frozen=True, slots=True)
class LastWords:
    perplexity: float  # of a word, its tokens together
    accuracy: float  # words whose every token is the most likely one


@torch.no_grad()
def last_words(network: Network, tokenizer: Tokenizer, passages: Sequence[str]) -> LastWords:
    """LAMBADA (Paperno et al., 2016): the last word of each passage, given the rest, with no stop-word filter."""
    loss, right = 0.0, 0
    for passage in passages:
        rest, _, word = passage.rpartition(" ")
        given = [tokenizer.eos_token_id, *tokenizer.encode(rest)]
        wanted = torch.tensor(tokenizer.encode(" " + word))
        ids = torch.tensor(given + wanted.tolist())
        logits = (
            network(ids[:-1].unsqueeze(0))[0, -len(wanted) :] @ network.head.t()
        )  # (tokens of the word, vocabulary)
        loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        right += bool((logits.argmax(1) == wanted).all())
    return LastWords(math.exp(loss / len(passages)), right / len(passages))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.training.measure", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of the checkpoint")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE", help=".txt or .txt.xz")
    parser.add_argument("--lambada", type=Path, metavar="FILE", help='lines of {"text": ...}')
    parser.add_argument("--stride", type=int, default=512, metavar="N", help="of the windows (%(default)s)")
    parser.add_argument("--windows", type=int, metavar="N", help="score only N windows of each text, spread evenly")
    args = parser.parse_args(arguments)
    network = load_network(args.model)
    config = network.config
    tokenizer = read_tokenizer(args.model, config.vocab_size, config.eos_token_ids)
    for path in args.text:
        ids = [id_ for text in read_documents(path) for id_ in [tokenizer.eos_token_id, *tokenizer.encode(text)]]
        tokens = np.array(ids)
        sparse = args.windows is not None
        loss = spread_loss(network, tokens, args.windows) if sparse else mean_loss(network, tokens, args.stride)
        count = args.windows * config.n_positions if sparse else len(ids) - 1
        print(f"{path.name}: {count} tokens, loss {loss:.4f}, perplexity {math.exp(loss):.2f}", flush=True)
    if args.lambada:
        passages = [json.loads(line)["text"] for line in args.lambada.read_text("utf-8").splitlines()]
        words = last_words(network, tokenizer, passages)
        print(f"{args.lambada.name}: perplexity {words.perplexity:.2f}, accuracy {100 * words.accuracy:.2f} %")


if __name__ == "__main__":
    main()
