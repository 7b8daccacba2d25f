"""`gpt2-server evaluate` against transformers: loss and accuracy of lines, of a text, and of models beside."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from server.checkpoint import EMBEDDED

COMMAND = [sys.executable, "-m", "server.cli", "evaluate", "--threads", "1"]
LINES = [
    {"prompt": "The sea", "completion": " was calm — 日本."},
    {"prompt": "", "completion": "Ahoy"},
    {"text": "A long swell on the bar. Nothing more."},
]
END = 50256


def evaluate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


def rows(*arguments: str | Path) -> list[dict[str, Any]]:
    done = evaluate(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@torch.no_grad()
def oracle(model: Any, sequences: list[tuple[list[int], int]], size: int) -> dict[str, float]:
    """sequences: ids, and how many of them are given; size: in bytes, of what is scored."""
    nats, right, tokens = 0.0, 0, 0
    for ids, given in sequences:
        logits = model(torch.tensor([ids])).logits[0, given - 1 : -1]
        wanted = torch.tensor(ids[given:])
        nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        right += int((logits.argmax(1) == wanted).sum())
        tokens += len(wanted)
    loss = nats / tokens
    return {
        "tokens": tokens, "loss": loss, "perplexity": math.exp(loss), "accuracy": right / tokens,
        "bits_per_byte": nats / math.log(2) / size,
    }  # fmt: skip


def check(row: dict[str, Any], wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, rel=1e-4), name


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), "utf-8")
    return path


def sequences() -> tuple[list[tuple[list[int], int]], int]:
    encode = GPT2Tokenizer(str(EMBEDDED / "vocab.json"), str(EMBEDDED / "merges.txt")).encode
    first, then = encode("The sea"), encode(" was calm — 日本.")
    whole = [
        ([*first, *then, END], len(first)),
        ([END, *encode("Ahoy"), END], 1),
        ([END, *encode(LINES[2]["text"]), END], 1),
    ]
    return whole, sum(len(text.encode()) for text in (" was calm — 日本.", "Ahoy", LINES[2]["text"]))


def test_base_adapter_and_student_side_by_side(lines: Path, tiny: Path, tmp_path: Path) -> None:
    base = GPT2LMHeadModel.from_pretrained(tiny)
    student, adapter = tmp_path / "student", tmp_path / "adapter"
    smaller = GPT2LMHeadModel(type(base.config)(**{**base.config.to_dict(), "n_embd": 32, "n_layer": 1, "n_head": 2}))
    smaller.save_pretrained(student)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny / name, student)
    config = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        get_peft_model(GPT2LMHeadModel.from_pretrained(tiny), config).save_pretrained(adapter)
        adapted = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny), str(adapter))
    found = rows(tiny, lines, "--beside", adapter, student)
    assert [row["model"] for row in found] == [str(tiny), str(adapter), str(student)]
    for row, model in zip(found, (base, adapted, smaller), strict=True):
        check(row, oracle(model.eval(), *sequences()))


def test_a_text_is_scored_whole_in_windows(tiny: Path, tmp_path: Path) -> None:
    text = " ".join(f"Entry {n}: wind light, south-east." for n in range(250))
    file = tmp_path / "held-out.txt"
    file.write_text(text, "utf-8")
    ids = [END, *GPT2Tokenizer(str(EMBEDDED / "vocab.json"), str(EMBEDDED / "merges.txt")).encode(text), END]
    windows = [(ids[start : start + 1024], 1) for start in range(0, len(ids) - 1, 1023)]
    assert len(windows) > 1
    (row,) = rows(tiny, file)
    check(row, oracle(GPT2LMHeadModel.from_pretrained(tiny).eval(), windows, len(text)))
    shown = evaluate(tiny, file).stdout.splitlines()
    assert shown[0].split() == ["model", "tokens", "loss", "perplexity", "accuracy", "bits/byte"]
    assert f"{row['loss']:.4f}" in shown[1]


@pytest.mark.parametrize(
    ("content", "name", "line"),
    [
        (b"{}\n", "a.jsonl", "a.jsonl, line 1: it must have"),
        (b"\xff", "a.txt", "a.txt is not UTF-8"),
        (b"", "a.txt", "a.txt is empty"),
        (None, "a.txt", "cannot read a.txt: No such file"),
    ],
)
def test_what_is_no_text_is_said_in_one_line(
    content: bytes | None, name: str, line: str, tiny: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = evaluate(tiny, tmp_path / name)
    assert done.returncode == 78
    assert line in done.stderr
    assert "Traceback" not in done.stderr
