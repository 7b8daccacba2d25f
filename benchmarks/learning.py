"""Training of 124M's shape beside Hugging Face's Trainer and peft: tokens a second and the most memory.

`python -m benchmarks.learning` makes random weights of the shape and a file of lines, and runs each kind in a process
of its own, in turns, with the same threads, lines and examples in a step. Tokens are those of the examples, without
padding.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
END = "<|endoftext|>"
TEXT = "the sea was calm and a long swell ran on the bar while the lamp burned low over the harbour"
KINDS = [(who, trainable) for trainable in ("lora", "full") for who in ("ours", "hf")]


def write_lines(path: Path, count: int) -> None:
    """Prompts and completions of unequal length, as they are."""
    chance, words = np.random.default_rng(1), TEXT.split()
    with path.open("w") as file:
        for _ in range(count):
            prompt, completion = (" ".join(chance.choice(words, size)) for size in chance.integers(8, 96, size=2))
            file.write(json.dumps({"prompt": prompt, "completion": f" {completion}"}) + "\n")


def make_model(directory: Path, tiny: bool) -> None:
    from server.checkpoint import EMBEDDED  # noqa: PLC0415  (as are the others: each process imports what it measures)

    job = {
        "train": str(directory / "lines.jsonl"), "out": str(directory / "base"), "model": str(EMBEDDED), "init": "gpt2",
        "trainable": "full", "shape": {**SHAPE, "n_layer": 1, "n_embd": 48} if tiny else SHAPE, "checkpoints": 0,
        "hyperparameters": {"max_steps": 1, "batch_size": 1},
    }  # fmt: skip
    (directory / "base.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "model.training.finetune", str(directory / "base.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# === One run, in its own process ===


def speeds(tokens: int, seconds: float, cpu: float) -> dict[str, float]:
    """cpu: seconds of CPU time, which on a machine that others use too says more."""
    return {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / cpu}


def run_ours(directory: Path, trainable: str, batch: int, steps: int, threads: int) -> dict[str, float]:
    from model.training.job import parse_job  # noqa: PLC0415
    from model.training.prepare import prepare  # noqa: PLC0415

    torch.set_num_threads(threads)
    job = {
        "train": str(directory / "lines.jsonl"), "out": str(directory / "out"), "model": str(directory / "base/model"),
        "trainable": trainable, "lora": {"targets": ["c_attn", "c_proj", "c_fc"]}, "threads": threads,
        "hyperparameters": {"max_steps": steps, "batch_size": batch, "learning_rate": 1e-4},
    }  # fmt: skip
    tuner = prepare(parse_job(json.dumps(job).encode())).tuner
    tuner.train_step()
    tokens, began, used = 0, time.perf_counter(), time.process_time()
    for _ in range(steps - 1):
        tokens += sum(len(part.tokens) for example in tuner._batch() for part in example.parts)
        tuner.train_step()
    return speeds(tokens, time.perf_counter() - began, time.process_time() - used)


def run_hf(directory: Path, trainable: str, batch: int, steps: int, threads: int) -> dict[str, float]:
    """Trainer as its users set it up: padding to the longest of a batch, the prompt's labels masked."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        DataCollatorForSeq2Seq,
        GPT2LMHeadModel,
        GPT2Tokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )  # fmt: skip

    torch.set_num_threads(threads)
    base = directory / "base" / "model"
    tokenizer = GPT2Tokenizer(str(base / "vocab.json"), str(base / "merges.txt"), pad_token=END)
    model: Any = GPT2LMHeadModel.from_pretrained(base)
    if trainable == "lora":
        targets = ["c_attn", "c_proj", "c_fc"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=True))
    examples = []
    for line in (directory / "lines.jsonl").read_text().splitlines():
        prompt, completion = (tokenizer.encode(text) for text in json.loads(line).values())
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        labels = [*[-100] * len(prompt), *ids[len(prompt) :]]
        examples.append({"input_ids": ids, "labels": labels})
    times: list[tuple[float, float]] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    collate = DataCollatorForSeq2Seq(tokenizer, model=None, padding=True)

    def counted(rows: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    arguments = TrainingArguments(
        output_dir=str(directory / "hf"), max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-4,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=examples, data_collator=counted, callbacks=[Clock()]).train()
    return speeds(sum(tokens[1 : len(times)]), times[-1][0] - times[0][0], times[-1][1] - times[0][1])


def child(arguments: argparse.Namespace) -> None:
    run = run_ours if arguments.who == "ours" else run_hf
    found = run(arguments.directory, arguments.trainable, arguments.batch, arguments.steps, arguments.threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**found, "peak_mib": peak}), flush=True)


# === All of them ===


def compare(directory: Path, arguments: argparse.Namespace) -> list[str]:
    """A row of a table each."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            numbers = [f"--{name}={getattr(arguments, name)}" for name in ("batch", "steps", "threads")]
            command = [sys.executable, "-m", "benchmarks.learning", "--directory", str(directory), *numbers]
            done = subprocess.run(
                [*command, "--who", kind[0], "--trainable", kind[1]], check=True, stdout=subprocess.PIPE, text=True
            )
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    rows = ["| trained | by | tokens/s | tokens a CPU second | peak memory, MiB |", "| --- | --- | --- | --- | --- |"]
    for (who, trainable), runs in found.items():
        speed, cpu, peak = (median(run[name] for run in runs) for name in runs[0])
        name = "gpt2-server" if who == "ours" else "Trainer" + " + peft" * (trainable == "lora")
        rows.append(f"| `{trainable}` | {name} | {speed:,.0f} | {cpu:,.0f} | {peak:,.0f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="examples in a step [%(default)s]")
    parser.add_argument("--steps", type=int, default=6, help="of each run, the first of which is not measured")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="another shape, which takes a moment")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--who", choices=["ours", "hf"], help=argparse.SUPPRESS)
    parser.add_argument("--trainable", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.who:
        child(arguments)
        return
    with tempfile.TemporaryDirectory() as made:
        write_lines(Path(made) / "lines.jsonl", arguments.batch * arguments.steps)
        make_model(Path(made), arguments.tiny)
        rows = compare(Path(made), arguments)
    print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {arguments.batch} examples a step"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
