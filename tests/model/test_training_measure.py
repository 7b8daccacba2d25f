"""What the model card reports is what it says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import GPT2LMHeadModel

from model.tokenizer import read_tokenizer
from model.training.checkpoint import load_network
from model.training.curve import draw
from model.training.log import Log, Row
from model.training.measure import last_words, main, mean_loss, spread_loss

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]
VOCAB = Path(__file__).parents[2] / "model" / "default"
CONTEXT = 128  # of the small checkpoints


@torch.no_grad()
def oracle_losses(oracle: GPT2LMHeadModel, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Of each token but the first, given all before it in `tokens`."""
    ids = torch.from_numpy(tokens)
    logits = oracle(ids[:-1].unsqueeze(0)).logits[0]
    losses: npt.NDArray[np.float32] = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
    return losses


@pytest.mark.parametrize("length", [2, 100, 129, 130, 300])
@pytest.mark.parametrize("stride", [32, CONTEXT])
def test_every_token_is_scored_once_in_the_first_window_that_reaches_it(
    make_checkpoint: Make, length: int, stride: int
) -> None:
    directory, oracle = make_checkpoint()
    tokens = np.random.default_rng(0).integers(503, size=length)
    windows = {
        begin: oracle_losses(oracle, tokens[begin : begin + CONTEXT + 1]) for begin in range(0, length - 1, stride)
    }
    first = {at: stride * max(0, math.ceil((at - CONTEXT) / stride)) for at in range(1, length)}
    expected = np.mean([windows[begin][at - begin - 1] for at, begin in first.items()])
    assert mean_loss(load_network(directory), tokens, stride) == pytest.approx(expected, abs=1e-4)


def test_spread_windows_reach_both_ends(make_checkpoint: Make) -> None:
    directory, oracle = make_checkpoint()
    tokens = np.random.default_rng(0).integers(503, size=1000)
    ends = [oracle_losses(oracle, window).mean() for window in (tokens[: CONTEXT + 1], tokens[-CONTEXT - 1 :])]
    assert spread_loss(load_network(directory), tokens, windows=2) == pytest.approx(np.mean(ends), abs=1e-4)


def test_last_words_and_perplexity_are_reported(
    make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, oracle = make_checkpoint(vocab_size=50257)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(VOCAB / name, directory)
    tokenizer = read_tokenizer(directory, 50257, (50256,))
    passages = ["The dog does not mind it, and the fox jumps over the dog", "one unforgettableness"]
    loss = 0.0
    for passage in passages:
        count = len(tokenizer.encode(" " + passage.split(" ")[-1]))
        loss += oracle_losses(oracle, np.array([50256, *tokenizer.encode(passage)]))[-count:].sum()
    words = last_words(load_network(directory), tokenizer, passages)
    assert words.perplexity == pytest.approx(math.exp(loss / 2), rel=1e-3)
    assert words.accuracy == 0.0

    (tmp_path / "text.txt").write_text(passages[0])
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    main([str(directory), "--text", str(tmp_path / "text.txt"), "--lambada", str(tmp_path / "lambada.jsonl")])
    first, second = capsys.readouterr().out.splitlines()
    text_loss = oracle_losses(oracle, np.array([50256, *tokenizer.encode(passages[0])])).mean()
    assert first.startswith(f"text.txt: 14 tokens, loss {text_loss:.3f}")
    assert second == f"lambada.jsonl: perplexity {words.perplexity:.2f}, accuracy 0.00 %"


def test_a_word_is_right_when_it_is_the_likeliest(make_checkpoint: Make) -> None:
    directory, _ = make_checkpoint(vocab_size=50257)
    tokenizer = read_tokenizer(VOCAB, 50257, (50256,))
    prompt, word, other = "The dog", " cat", " house"
    network = load_network(directory)
    with torch.no_grad():
        hidden = network(torch.tensor([[50256, *tokenizer.encode(prompt)]]))[0, -1]
        (cat,) = tokenizer.encode(word)
        network.head[cat] = hidden  # its logit is now |hidden|²: the largest
    assert last_words(network, tokenizer, [prompt + word]).accuracy == 1.0
    assert last_words(network, tokenizer, [prompt + word, prompt + other]).accuracy == 0.5


def test_a_log_becomes_a_picture(tmp_path: Path) -> None:
    with Log(tmp_path / "log.csv", 0) as log:
        for step in range(1, 80):
            log.write(Row(step, 64 * step, float(step), 9.0 - step / 20, 8.0 if step % 20 == 0 else None, 1.0))
    draw(tmp_path / "log.csv", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
