"""The card written beside a trained model's weights: what it came from, how, and what its losses were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from model.training.checkpoint import write_atomically
from model.training.job import Job
from model.training.log import read_log

METHODS = {
    "full": "every weight was trained",
    "lora": "a low-rank adapter was trained beside frozen weights",
    "output_layer": "the output layer alone was trained, untied from the input embedding",
}


@dataclass(frozen=True, slots=True)
class Made:
    """What a job has come to that it did not say itself."""

    kind: str  # "model" or "adapter"
    examples: int
    batch_size: int
    rate: float  # at its height


def write_card(path: Path, job: Job, made: Made, log: Path) -> None:
    write_atomically(path, _card(job, made, log).encode())


def _card(job: Job, made: Made, log: Path) -> str:
    base = job.base_name or Path(job.model or (job.distillation.teacher if job.distillation else "")).name
    front = ["---", "library_name: peft" if made.kind == "adapter" else "library_name: transformers"]
    front += [f"base_model: {base}", "pipeline_tag: text-generation", "---"]
    lines = [*front, "", f"# {job.name or 'A fine-tuned ' + base}", "", _story(job, base), ""]
    lines += ["| | |", "| --- | --- |", f"| examples | {made.examples:,} |"]
    lines += [f"| {name} | {value} |" for name, value in _numbers(job, made)]
    lines += [f"| {name} | {value} |" for name, value in _losses(log)]
    lines += [
        "",
        "The loss curve is `loss.png`; every step of it is in the run's `log.csv`.",
        "",
        *_repeating(job, made),
        "",
    ]
    return "\n".join(lines)


def _story(job: Job, base: str) -> str:
    if job.distillation is not None:
        teacher = Path(job.distillation.teacher).name if job.model or job.init else base
        return f"Distilled from {teacher} by gpt2-server: a student that learnt its teacher's distributions."
    if job.init is not None:
        return f"Trained from random weights ({job.init}) by gpt2-server, with the vocabulary of {base}."
    if job.method == "dpo":
        return f"Taught by gpt2-server which of two answers is preferred, from {base}: {METHODS[job.trainable]}."
    return f"Fine-tuned from {base} by gpt2-server: {METHODS[job.trainable]}."


def _repeating(job: Job, made: Made) -> list[str]:
    """Everything that shaped the result, none of it left to a default that may change."""
    given = msgspec.structs.replace(job.hyperparameters, batch_size=made.batch_size)
    whole = msgspec.structs.replace(job, hyperparameters=given, out="again", base_name=job.base_name)
    text = msgspec.json.format(msgspec.json.encode(whole)).decode()
    told = (
        "The same files and this `JOB.json` give the same weights again: `python -m model.training.finetune JOB.json`."
    )
    return [told, "", "```json", text, "```"]


def _numbers(job: Job, made: Made) -> list[tuple[str, object]]:
    given = job.hyperparameters
    numbers: list[tuple[str, object]] = [("method", job.method), ("trainable", job.trainable), ("seed", given.seed)]
    numbers += [("training file", Path(job.train).name)]
    if job.valid is not None:
        numbers += [("validation file", Path(job.valid).name)]
    numbers += [
        ("learning rate", f"{made.rate:g}"), ("examples in a step", made.batch_size), ("epochs", given.epochs),
        ("warm-up", f"{given.warm_up:g} of the steps, then a cosine to {given.rate_floor:g} of the rate"),
        ("weight decay", f"{given.weight_decay:g}"), ("dropout", f"{given.dropout:g}"),
        ("gradients clipped to", f"{given.clip:g}"),
    ]  # fmt: skip
    if job.method == "dpo":
        numbers += [("beta", f"{job.dpo.beta:g}")]
    if job.trainable == "lora":
        numbers += [("rank", job.lora.rank), ("alpha", f"{job.lora.alpha:g}"), ("targets", ", ".join(job.lora.targets))]
    if job.distillation is not None:
        terms = ("temperature", "soft", "hard", "hidden", "attention")
        numbers += [(term, f"{getattr(job.distillation, term):g}") for term in terms]
    return numbers


def _losses(log: Path) -> list[tuple[str, str]]:
    rows = read_log(log)
    if not rows:
        return []
    valid = [float(row["valid_loss"]) for row in rows if row["valid_loss"]]
    losses = [("steps", rows[-1]["step"]), ("tokens learnt", f"{int(rows[-1]['tokens']):,}")]
    losses += [("first training loss", rows[0]["loss"]), ("last training loss", rows[-1]["loss"])]
    if valid:
        perplexity = f"{math.exp(min(valid[-1], 50.0)):.2f}"
        losses += [("last validation loss", f"{valid[-1]:.4f}"), ("its perplexity", perplexity)]
    return losses
