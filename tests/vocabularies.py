"""Small vocabularies of the other kinds, made here: WordPiece as in Chinese GPT-2s, unigram as in Japanese ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random

import sentencepiece
import torch
from safetensors.torch import save_file

from model.config import read_config
from model.weights import expected_shapes

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ENGLISH = ["the", "sea", "hello", "world", "is", "no", "##s", "##ing", "##ea", "s", "un", "##known", "2026", "##5"]
CHINESE = [
    *"今天气很好你我他在大海上日本",
    "##天",
    "##好",
    "の",
    "##の",
    "カ",
    "##カ",
    "，",
    "。",
    "《",
    "》",
    "“",
    "”",
    "！",
]
MARKS = [*".,?!'-:;()[]", "n't", "'s"]
WORDS = ["the", "sea", "sky", "over", "under", "cat", "dog", "runs", "hello", "world"]
JAPANESE = ["さくら", "東京", "京都", "です", "ます", "日本"]


def write_wordpiece(directory: Path) -> int:
    """vocab.txt and its config. Returns how many pieces there are."""
    pieces = [*BERT, *ENGLISH, *CHINESE, *MARKS, *"abcdefghijklmnopqrstuvwxyz0123456789", *[f"##{c}" for c in "abcxyz"]]
    pieces = list(dict.fromkeys(pieces))
    directory.joinpath("vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    directory.joinpath("tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return len(pieces)


def write_unigram(directory: Path) -> int:
    """spiece.model, trained on a few words, with a piece for every byte. Returns how many pieces there are."""
    chance = Random(1)
    lines = [" ".join(chance.choices([*WORDS, *JAPANESE], k=8)) for _ in range(500)]
    lines += ["".join(chance.choices(JAPANESE, k=6)) for _ in range(500)]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    directory.joinpath("spiece.model").write_bytes(trained.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).get_piece_size()


def write_model(directory: Path, vocab_size: int, **config: int) -> None:
    """Two layers of random weights, of which every token is as likely as any other."""
    shape = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 64,
        "n_positions": 256,
        "vocab_size": vocab_size,
    }
    (directory / "config.json").write_text(json.dumps({**shape, **config}))
    noise = torch.Generator().manual_seed(11)
    tensors = {}
    for name, sizes in expected_shapes(read_config(directory)).items():
        weight = torch.randn(sizes, generator=noise)
        tensors[name] = 1 + 0.1 * weight if ".ln_" in name and name.endswith("weight") else 0.15 * weight
    tensors["wpe.weight"] *= 6
    save_file(tensors, directory / "model.safetensors")
