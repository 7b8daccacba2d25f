"""What a training job asks for: a JSON file, read once, refused where it makes no sense. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from model.adapter_config import sites_of
from model.errors import AdapterError, JobError
from model.training.digests import digest_of

Count = Annotated[int, Meta(ge=1, le=1 << 30)]
Positive = Annotated[float, Meta(gt=0.0, le=1e6)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Weight = Annotated[float, Meta(ge=0.0, le=1e6)]


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 3
    max_steps: Count | None = None  # end after so many, if the epochs have more
    batch_size: Annotated[int, Meta(ge=1, le=4096)] | None = None  # examples in a step; None: by how many there are
    learning_rate: Positive | None = None  # at its height; None: by method and width
    learning_rate_multiplier: Positive = 1.0
    warm_up: Share = 0.1  # of all steps; then a cosine down to `rate_floor`
    rate_floor: Share = 0.0  # of the learning rate, where the cosine ends
    weight_decay: Share = 0.01  # of matrices
    clip: Positive = 1.0  # largest norm of all gradients together
    early_stop: Count | None = None  # validations without a better loss before the end; the best weights are kept
    validate_every: Count | None = None  # steps; None: after each epoch
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0  # of embeddings, attention and what layers add
    seed: Annotated[int, Meta(ge=0, lt=1 << 32)] = 1


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rank: Annotated[int, Meta(ge=1, le=1024)] = 8
    alpha: Positive = 16.0
    targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")
    merge: bool = False  # write a whole model in place of an adapter


class Distillation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of the terms are relative to each other; DistilGPT-2's were 5, 2 and 1 (soft, hard, hidden)."""

    teacher: str  # its directory
    temperature: Positive = 2.0
    soft: Weight = 1.0  # Kullback-Leibler divergence from the teacher's tempered probabilities, times temperature^2
    hard: Weight = 0.0  # cross entropy with the text
    hidden: Weight = 0.0  # 1 - cosine of hidden states
    attention: Weight = 0.0  # Kullback-Leibler divergence of attention probabilities
    layers: Count | None = None  # of a student copied from the teacher's; None: half of them, every other one
    embeddings: Literal["train", "freeze"] = "train"


class Dpo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    beta: Annotated[float, Meta(gt=0.0, le=2.0)] = 0.1  # how near to its beginning the model is held


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a network that is made from nothing; what is not given is the vocabulary's model's."""

    n_layer: Count | None = None
    n_head: Count | None = None
    n_embd: Count | None = None
    n_positions: Count | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    train: str  # a JSONL file
    out: str  # a directory
    model: str | None = None  # the directory to start from; for a student, None makes it of the teacher's layers
    adapter: str | None = None  # a LoRA adapter of that model: learnt further by `lora`, merged into it by the others
    method: Literal["supervised", "distillation", "dpo"] = "supervised"
    trainable: Literal["full", "lora", "output_layer"] = "lora"
    init: Literal["gpt2", "xavier"] | None = (
        None  # start from random weights; `model` or teacher gives vocabulary, shape
    )
    shape: Shape = Shape()
    valid: str | None = None  # a JSONL file
    valid_tokens: Count | None = None  # learnt ones that are measured, of examples evenly spread; None: all
    too_long: Literal["truncate", "split", "refuse"] = "truncate"  # of an example longer than the context
    chat_template: str | None = None  # Jinja source
    hyperparameters: Hyperparameters = Hyperparameters()
    lora: Lora = Lora()
    distillation: Distillation | None = None
    dpo: Dpo = Dpo()
    base_name: str | None = None  # what cards and adapters call the model they come from
    name: str | None = None  # what the card calls the result
    device: Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of matrix products; auto: bfloat16 on a GPU that has it
    )
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the weights written
    threads: Count | None = None
    nice: Annotated[int, Meta(ge=0, le=19)] = 0
    micro_batch_tokens: Count = 4096  # computed at once; changes memory and time, not the result
    recompute: bool = False  # gradient checkpointing: less memory, more time
    save_every: Annotated[float, Meta(ge=0.0)] = 60.0  # seconds between states to resume from
    checkpoints: Annotated[int, Meta(ge=0, le=100)] = 3  # models kept of the ends of epochs

    def fingerprint(self) -> str:
        """The same for jobs that compute the same, from files that hold the same; where it is run, where its files are
        and how often it is saved are left out. Raises OSError."""
        elsewhere = {"device": "auto", "threads": None, "nice": 0, "save_every": 0.0, "checkpoints": 0, "name": None}
        files = {name: digest_of(getattr(self, name)) for name in ("train", "valid", "model", "adapter")}
        teacher = self.distillation
        if teacher is not None:
            teacher = msgspec.structs.replace(teacher, teacher=digest_of(teacher.teacher))
        same = msgspec.structs.replace(self, out="", base_name=None, distillation=teacher, **files, **elsewhere)
        return hashlib.sha256(msgspec.json.encode(same)).hexdigest()[:16]


def read_job(path: Path) -> Job:
    """Raises JobError."""
    try:
        return parse_job(path.read_bytes())
    except OSError as error:
        raise JobError(f"cannot read {path.name}: {error.strerror}") from None


def parse_job(raw: bytes) -> Job:
    """Raises JobError."""
    try:
        job = msgspec.json.decode(raw, type=Job)
    except msgspec.DecodeError as error:
        raise JobError(f"the job is not one: {str(error)[:1].lower()}{str(error)[1:]}") from None
    _check(job)
    return job


def _check(job: Job) -> None:
    distils = job.method == "distillation"
    if distils != (job.distillation is not None):
        raise JobError("method 'distillation' and a 'distillation' with its teacher need each other")
    if job.model is None and not distils:
        raise JobError("the job names no model to start from")
    if distils and job.trainable != "full":
        raise JobError("distillation trains the whole student: trainable must be 'full'")
    if job.init is not None and (job.trainable != "full" or job.adapter is not None):
        raise JobError("random weights are trained whole: 'init' goes with trainable 'full' and no adapter")
    if job.init is None and job.shape != Shape():
        raise JobError("a shape of its own needs 'init': weights are copied as they are")
    if job.method == "dpo" and job.init is not None:
        raise JobError("preferences are learnt by a model that speaks already: 'init' does not go with method 'dpo'")
    if job.hyperparameters.early_stop is not None and job.valid is None:
        raise JobError("early_stop needs validation data")
    if job.distillation is not None and not any(
        (job.distillation.soft, job.distillation.hard, job.distillation.hidden, job.distillation.attention)
    ):
        raise JobError("every term of the distillation's loss has the weight zero")
    try:
        sites_of(job.lora.targets)
    except AdapterError as error:
        raise JobError(str(error)) from None
    if not job.lora.targets:
        raise JobError("lora has no targets")
