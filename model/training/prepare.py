"""From a job to what is trained: the network, what of it learns, its data, its numbers. Trains nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from model.adapter_config import AdapterConfig, sites_of
from model.chat_template import ChatTemplate
from model.config import ModelConfig, read_config
from model.errors import ConfigError
from model.gpu import cuda
from model.loading import choose_device
from model.tokenizer import Tokenizer, read_tokenizer
from model.tokenizer_files import SPIECE_NAMES
from model.training.checkpoint import export_weights, load_network
from model.training.dataset import Example, Preference, Reader, TooLong, read_examples, read_preferences, repeated
from model.training.distill import Distiller, check_pair, make_student
from model.training.job import Job, Shape
from model.training.lora import add_lora, export_lora, load_lora, merge_lora, merged_weights
from model.training.network import Network
from model.training.preference import PreferenceLoss, without_lora
from model.training.tuner import Objective, Recipe, Tuner, cross_entropy

RATES = {"full": 1e-4, "lora": 1e-3, "output_layer": 5e-4}  # at GPT-2's width; narrower networks bear more
DPO_SHARE = 0.1  # of these
FROM_SCRATCH_RATE = 6e-4
DISTILLATION_RATE = 2.5e-4
GPT2_WIDTH = 768
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "vocab.txt", *SPIECE_NAMES, "tokenizer_config.json",
    "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    tuner: Tuner
    examples: int
    valid_examples: int
    target_tokens: int  # in one epoch
    validate_every: int  # steps
    learning: int  # parameters
    kind: str  # of what is written: "model" or "adapter"
    notes: list[str]  # what is to be said of the data
    write: Callable[[Path], None]  # the result as it is now, into a directory


@dataclass(frozen=True, slots=True)
class Data:
    examples: Sequence[Example | Preference]
    valid: Sequence[Example | Preference]
    notes: list[str]


def prepare(job: Job) -> Prepared:
    """Raises ModelError: the job, its data, a model or an adapter cannot be used."""
    device = choose_device(job.device)
    base = _base(job)
    config = read_config(base)
    tokenizer = read_tokenizer(base, config.vocab_size, config.eos_token_ids)
    torch.manual_seed(job.hyperparameters.seed)
    network, adapter = _network(job, config)
    template = None
    if job.chat_template is not None:
        template = ChatTemplate(job.chat_template, named=tokenizer.named)
    data = _data(job, tokenizer, network.config.n_positions, template)
    examples, valid = data.examples, data.valid
    recipe = _recipe(job, network.config, len(examples), device)
    network.transformer.recompute = job.recompute
    network.set_dropout(job.hyperparameters.dropout)
    tuner = Tuner(network, _objective(job, network, device), examples, valid, recipe, device)
    return Prepared(
        tuner=tuner,
        examples=len(examples),
        valid_examples=len(valid),
        target_tokens=sum(example.targets for example in examples),
        validate_every=job.hyperparameters.validate_every or tuner.steps_per_epoch,
        learning=sum(each.numel() for each in network.parameters() if each.requires_grad),
        kind="model" if adapter is None or job.lora.merge else "adapter",
        notes=data.notes,
        write=_writer(job, base, network, adapter),
    )


def _data(job: Job, tokenizer: Tokenizer, context: int, template: ChatTemplate | None) -> Data:
    """Raises DataError."""
    notes: list[str] = []
    seen: set[bytes] = set()

    def read(path: Path) -> Sequence[Example | Preference]:
        reader = Reader(tokenizer, context, template, TooLong(job.too_long))
        found = read_preferences(path, reader) if job.method == "dpo" else read_examples(path, reader)
        notes.extend(reader.counts.notes(path.name, context, reader.too_long))
        return found

    examples = read(Path(job.train))
    if twice := repeated(examples, seen):
        notes.append(f"{Path(job.train).name}: examples that are there already: {twice:,}")
    if job.valid is None:
        return Data(examples, (), notes)
    valid = read(Path(job.valid))
    if both := repeated(valid, seen):
        notes.append(f"{Path(job.valid).name}: examples that are learnt too, or there already: {both:,}")
    chosen = _evenly(valid, job.valid_tokens)
    if len(chosen) < len(valid):
        notes.append(f"{Path(job.valid).name}: measured on {len(chosen):,} of {len(valid):,} examples, evenly spread")
    return Data(examples, chosen, notes)


def _evenly(examples: Sequence[Example | Preference], tokens: int | None) -> Sequence[Example | Preference]:
    """Of about so many learnt tokens; one at least."""
    have = sum(example.targets for example in examples)
    if tokens is None or tokens >= have:
        return examples
    count = max(1, len(examples) * tokens // have)
    return [examples[i * len(examples) // count] for i in range(count)]


def _base(job: Job) -> Path:
    """The model that gives the vocabulary, and where it is not random the weights."""
    base = job.model if job.model is not None else job.distillation.teacher if job.distillation else None
    assert base is not None
    return Path(base)


def _network(job: Job, config: ModelConfig) -> tuple[Network, AdapterConfig | None]:
    """In fp32, its learning parameters asking for gradients; and the adapter's description, where one is learnt."""
    generator = torch.Generator().manual_seed(job.hyperparameters.seed)
    if job.init is not None:
        network = Network(_shaped(config, job.shape))
        (network.initialise if job.init == "gpt2" else network.initialise_xavier)(generator)
    elif job.model is None:
        assert job.distillation is not None
        network = make_student(load_network(Path(job.distillation.teacher)), job.distillation.layers)
    else:
        network = load_network(Path(job.model))
    if job.trainable == "lora":
        return network, _add_adapter(job, network, generator)
    if job.adapter is not None:
        load_lora(network, Path(job.adapter))
        merge_lora(network)
        network.requires_grad_(True)
    if job.trainable == "output_layer":
        network = _untied(network)
    if job.distillation is not None and job.distillation.embeddings == "freeze":
        network.transformer.wte.requires_grad_(False)
        network.transformer.wpe.requires_grad_(False)
    return network, None


def _add_adapter(job: Job, network: Network, generator: torch.Generator) -> AdapterConfig:
    name = job.base_name or Path(job.model or "").name
    if job.adapter is not None:
        return replace(load_lora(network, Path(job.adapter)), base=name)
    config = AdapterConfig(rank=job.lora.rank, alpha=job.lora.alpha, targets=sites_of(job.lora.targets), base=name)
    add_lora(network, config, generator)
    return config


def _untied(network: Network) -> Network:
    """The same function, of which the head alone learns."""
    free = Network(replace(network.config, tie_word_embeddings=False))
    free.transformer = network.transformer
    free.requires_grad_(False)
    free.lm_head.weight = torch.nn.Parameter(network.head.detach().clone())
    return free


def _shaped(config: ModelConfig, shape: Shape) -> ModelConfig:
    """Raises ConfigError."""
    width, heads = shape.n_embd or config.n_embd, shape.n_head or config.n_head
    if width % heads:
        raise ConfigError(f"shape: n_embd {width} is not a multiple of n_head {heads}")
    return replace(
        config,
        n_layer=shape.n_layer or config.n_layer,
        n_head=heads,
        n_embd=width,
        n_inner=4 * width if shape.n_embd else config.n_inner,
        n_positions=shape.n_positions or config.n_positions,
    )


def _objective(job: Job, network: Network, device: torch.device) -> Objective:
    """network: as training begins. Raises JobError where the teacher cannot teach a student of this shape."""
    if job.method == "dpo":
        if job.trainable == "lora" and job.adapter is None:  # beside which the beginning still stands
            return PreferenceLoss(network, job.dpo.beta, partial(without_lora, network))
        return PreferenceLoss(deepcopy(network).requires_grad_(False).eval().to(device), job.dpo.beta)
    if job.distillation is None:
        return cross_entropy
    teacher = load_network(Path(job.distillation.teacher)).eval().to(device)
    check_pair(teacher.config, network.config, job.distillation)
    return Distiller(teacher, job.distillation)


def _recipe(job: Job, config: ModelConfig, examples: int, device: torch.device) -> Recipe:
    given = job.hyperparameters
    size = given.batch_size or min(32, max(1, examples // 32))
    steps = given.epochs * -(-examples // size)
    if given.max_steps is not None:
        steps = min(steps, given.max_steps)
    return Recipe(
        steps=steps,
        batch_size=size,
        rate=(given.learning_rate or _rate(job, config)) * given.learning_rate_multiplier,
        warm_up=round(given.warm_up * steps),
        rate_floor=given.rate_floor,
        weight_decay=given.weight_decay,
        clip=given.clip,
        patience=given.early_stop,
        seed=given.seed,
        micro_batch_tokens=job.micro_batch_tokens,
        half_precision=_half_precision(job.precision, device),
    )


def _rate(job: Job, config: ModelConfig) -> float:
    rate = RATES[job.trainable] if job.distillation is None else DISTILLATION_RATE
    if job.method == "dpo":
        rate *= DPO_SHARE
    if job.init is not None:
        rate = FROM_SCRATCH_RATE
    return rate * GPT2_WIDTH / config.n_embd


def _half_precision(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and cuda.has_bfloat16()
    return precision == "bfloat16"


def _writer(job: Job, base: Path, network: Network, adapter: AdapterConfig | None) -> Callable[[Path], None]:
    dtype: torch.dtype = getattr(torch, job.dtype)

    def write(directory: Path) -> None:
        if adapter is not None and not job.lora.merge:
            export_lora(network, adapter, directory)
            return
        export_weights(merged_weights(network), network.config, directory, dtype)
        for name in TOKENIZER_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, directory / name)

    return write
