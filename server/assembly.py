"""From settings to everything that answers requests, put together and not yet started: each part gets the few numbers
it uses.

Knows no socket and no signal: lifecycle.py, ray_serve.py and `complete` each carry a backend in their own way.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from model.chat_template import find_chat_template
from model.config import ModelConfig, read_config
from model.errors import ConfigError, ModelError
from model.files import CONFIG_BYTES, is_file, read_bytes
from model.tokenizer import Tokenizer, read_tokenizer
from server import __version__
from server.api.chat_template import ChatTemplate, chat_template_source
from server.api.completions import CompletionService
from server.api.keys import Key, Keyring, load_keys
from server.api.limits import Limits
from server.api.models import ServedModel
from server.api.phrases import Phrases
from server.app import create_app
from server.checkpoint import Checkpoint, find_checkpoint
from server.engine.admission import Admission
from server.engine.crash_loop import CrashLoop
from server.engine.engine import Engine
from server.engine.grammars import GrammarChecker, Whitespace, checker_command
from server.engine.observer import Observer
from server.engine.output import TokenTexts
from server.engine.quota import TokenBuckets
from server.engine.supervisor import Supervisor
from server.engine.variants import Variants
from server.errors import SettingsError
from server.metrics import Metrics
from server.settings import Settings
from server.worker.messages import Start

if TYPE_CHECKING:  # imported where a data directory asks for it
    from server.stored import Stored

POLL = 0.02  # seconds between looks at whether a backend is ready
OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
KV_CACHE_GIB = 2.0  # where nothing else is asked for, and there is no GPU to fill


@dataclass(frozen=True, slots=True)
class Backend:
    """The application and the processes that compute for it. It has no socket: whoever has one carries it."""

    app: FastAPI
    engine: Engine
    supervisors: list[Supervisor]  # one for each worker
    grammars: GrammarChecker | None  # None where the vocabulary is not one of bytes
    served: ServedModel
    keys: Keyring | None
    metrics: Metrics
    stored: Stored | None  # None without a data directory
    notes: tuple[str, ...] = ()  # to be said at the start

    def start(self) -> list[asyncio.Task[int]]:
        """One task a worker; it ends, with an exit status, when its worker cannot be kept running."""
        if self.stored is not None:
            self.stored.start()
        return [asyncio.create_task(supervisor.run()) for supervisor in self.supervisors]

    async def stop(self, workers: list[asyncio.Task[int]]) -> int:
        """Returns the exit status. A part that fails to stop keeps no other from it; what it raised is raised then."""
        async with AsyncExitStack() as parts:  # the last one first
            if self.stored is not None:
                parts.callback(self.stored.close)
            if self.grammars is not None:
                parts.push_async_callback(self.grammars.stop)
            parts.push_async_callback(asyncio.wait, workers)
            for supervisor in self.supervisors:
                parts.callback(supervisor.stop)
            if self.stored is not None:
                await self.stored.stop()
        return max(worker.result() for worker in workers)


def assemble(settings: Settings) -> Backend:
    """Raises ModelError where the model cannot be served."""
    checkpoint = find_checkpoint(settings.model, settings.revision)
    config = read_config(checkpoint.directory)
    forced = settings.eos_token_id
    ends = forced or config.eos_token_ids
    tokenizer = read_tokenizer(checkpoint.directory, config.vocab_size, ends, forced=bool(forced))
    tokenizer.encode("")  # what it needs for that is made now, and not while the first request waits
    max_model_len = _context(settings, config)
    served = _served_model(settings, checkpoint, max_model_len)
    metrics = Metrics(served.name, __version__, settings.workers)
    admission = Admission(settings.max_num_queued_reqs, settings.max_num_queued_tokens)
    per_minute = settings.max_tokens_per_minute
    buckets = None if per_minute is None else TokenBuckets(per_minute)
    variants = _variants(settings.lora_modules, served, config)
    served = replace(served, variants=variants)
    engine = Engine(
        tokenizer,
        admission,
        Observer(metrics),
        settings.workers,
        buckets,
        request_timeout=settings.request_timeout,
        stall_timeout=settings.stall_timeout,
        variants=variants,
    )
    whitespace = Whitespace(settings.json_whitespace)
    command = checker_command(str(checkpoint.directory), config.vocab_size, tokenizer.eos_token_ids, whitespace)
    grammars = GrammarChecker(command) if tokenizer.byte_level and tokenizer.eos_token_ids else None
    keys = _keyring(settings)
    chat_template = _chat_template(settings, checkpoint.directory, tokenizer)
    tracing = _tracing()
    tracer = None if tracing is None else tracing.exporting_tracer(__version__)
    limits = _limits(settings, max_model_len, config.vocab_size)
    lines = CompletionService(  # another than the clients': /load does not count what nobody waits for
        engine=engine,
        tokenizer=tokenizer,
        model=served,
        limits=limits,
        texts=TokenTexts(tokenizer),
        running=set(),
        phrases=Phrases(tokenizer),
        grammars=grammars,
    )
    stored = _stored(settings, engine, served, checkpoint.directory, config, lines, metrics)
    app = create_app(
        engine=engine if tracing is None else tracing.TracedEngine(engine, tracer, served.name),
        tokenizer=tokenizer,
        model=served,
        limits=limits,
        version=__version__,
        registry=metrics.registry,
        on_answer=metrics.answered,
        grammars=grammars,
        chat_template=chat_template,
        sleeper=engine,
        stored=None if stored is None else stored.routes(served, limits),
        keys=keys,
        max_headers=settings.max_headers,
        open_paths=frozenset(settings.open_paths),
        cors_origins=settings.allowed_origins,
        playground=settings.playground,
    )
    if tracing is not None:
        app.add_middleware(tracing.TraceMiddleware, tracer=tracer)
    crash_loop = CrashLoop()
    return Backend(
        app=app,
        engine=engine,
        supervisors=[
            Supervisor(
                _start(settings, checkpoint, config, tokenizer, max_model_len, worker),
                engine,
                crash_loop,
                worker,
                stall_timeout=settings.stall_timeout,
            )
            for worker in range(settings.workers)
        ],
        grammars=grammars,
        served=served,
        keys=keys,
        metrics=metrics,
        stored=stored,
        notes=_notes(settings, checkpoint.directory, tokenizer),
    )


def _stored(settings: Settings, *parts: Any) -> Stored | None:
    """Raises SettingsError."""
    if settings.data_dir is None:
        return None
    stored: Stored = importlib.import_module("server.stored").open_stored(settings, *parts)
    return stored


def _tracing() -> Any | None:
    """The module server.tracing, where the standard variables ask for spans. Raises SettingsError without its extra."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    if off or not any(os.environ.get(name) for name in OTLP_ENDPOINTS):
        return None
    try:
        return importlib.import_module("server.tracing")
    except ImportError:
        raise SettingsError("OTEL_* variables ask for traces, which need: pip install 'gpt2-server[otel]'") from None


def _context(settings: Settings, config: ModelConfig) -> int:
    wanted = settings.max_model_len or config.n_positions
    if wanted > config.n_positions:
        raise ConfigError(f"max_model_len {wanted} is more than the model's {config.n_positions} positions")
    return wanted


def _chat_template(settings: Settings, directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    source = chat_template_source(settings.chat_template, directory)
    return None if source is None else ChatTemplate(source, named=tokenizer.named)


def _notes(settings: Settings, directory: Path, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What an operator should know of the model before the first request."""
    notes = [
        f"Token {id_} ({tokenizer.name(id_)!r}), which its files name as an end, is an ordinary word and ends nothing; "
        f"--eos-token-id {id_} makes it an end."
        for id_ in tokenizer.ends.words
    ]
    if not tokenizer.eos_token_ids:
        notes.append("No token ends a text: completions go on to max_tokens.")
    if settings.chat_template is None and find_chat_template(directory) is not None:
        notes.append("The model has a chat template: --chat-template auto turns chat on.")
    return tuple(notes)


def _served_model(settings: Settings, checkpoint: Checkpoint, max_model_len: int) -> ServedModel:
    name, *more = settings.served_model_name or [checkpoint.name]
    return ServedModel(
        name=name,
        aliases=(*more, *settings.alias),
        created=int(time.time()),
        root=checkpoint.name,
        max_model_len=max_model_len,
        fingerprint=_fingerprint(checkpoint, f"{settings.dtype} {settings.quantization} {settings.kv_cache_dtype}"),
    )


def _variants(modules: list[str], served: ServedModel, config: ModelConfig) -> Variants:
    """Raises SettingsError or ModelError."""
    variants = Variants(config)
    for module in modules:
        name, separator, path = module.partition("=")
        directory = Path(path).expanduser()
        if not separator or not name or not path:
            raise SettingsError(f"lora_modules: {module!r} is not name=directory")
        if not directory.is_dir():
            raise SettingsError(f"lora_modules: {name!r}: {path!r} is no directory")
        if name in served.names:
            raise SettingsError(f"lora_modules: {name!r} is a name of the model itself")
        try:
            variants.add(name, directory, required=True)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
    return variants


def _fingerprint(checkpoint: Checkpoint, formats: str) -> str:
    """The same for the same files, number formats and version: weights by size and time, which a start can afford."""
    digest = hashlib.sha256(f"{__version__} {formats}".encode())
    for path in filter(is_file, sorted(checkpoint.directory.glob("*.safetensors"))):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    digest.update(read_bytes(checkpoint.directory / "config.json", CONFIG_BYTES, ConfigError))
    return f"gpt2-server-{__version__}-{digest.hexdigest()[:8]}"


def _limits(settings: Settings, max_model_len: int, vocab_size: int) -> Limits:
    return Limits(
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        clamp_max_tokens=settings.clamp_max_tokens,
        max_choices=settings.max_choices,
        max_best_of=settings.max_best_of,
        max_prompts=settings.max_sequences,
        max_sequences=settings.max_sequences,
        max_stop_strings=settings.max_stop_strings,
        max_stop_length=settings.max_stop_length,
        max_logprobs=settings.max_logprobs,
        max_body_bytes=settings.max_body_bytes,
        body_timeout=settings.body_timeout,
    )


def _keyring(settings: Settings) -> Keyring | None:
    """None where nobody needs a key. Raises SettingsError."""
    keys = read_keys(settings)
    return Keyring(keys) if keys else None


def read_keys(settings: Settings) -> list[Key]:
    single = None if settings.api_key is None else settings.api_key.get_secret_value()
    return load_keys(single, settings.api_key_file)


def _start(
    settings: Settings,
    checkpoint: Checkpoint,
    config: ModelConfig,
    tokenizer: Tokenizer,
    max_model_len: int,
    worker: int,
) -> Start:
    """Of several workers, each has its share of the cores and of the KV cache, or a CUDA device of its own."""
    cores = len(os.sched_getaffinity(0))
    return Start(
        model=str(checkpoint.directory),
        eos_token_ids=list(tokenizer.eos_token_ids),
        device=f"cuda:{worker}" if settings.device == "cuda" and settings.workers > 1 else settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        target_itl=settings.target_itl,
        block_size=settings.block_size,
        kv_cache_bytes=int((settings.kv_cache_gib or KV_CACHE_GIB) * (1 << 30)) // settings.workers,
        gpu_utilization=settings.gpu_memory_utilization if settings.kv_cache_gib is None else None,
        deterministic=settings.deterministic,
        prefix_caching=settings.enable_prefix_caching,
        kernels=settings.kernels,
        threads=settings.threads or max(cores // settings.workers, 1),
        drafts=0 if settings.speculative_method == "off" else settings.num_speculative_tokens,
        draft_model=_draft_model(settings.speculative_model, config, max_model_len),
        variant_bytes=int(settings.lora_modules_gib * (1 << 30)) // settings.workers,
    )


def _draft_model(name: str | None, config: ModelConfig, max_model_len: int) -> str | None:
    """Its directory. Raises ModelError where it cannot guess for the model."""
    if name is None:
        return None
    directory = find_checkpoint(name, None).directory
    draft = read_config(directory)
    if draft.vocab_size != config.vocab_size:
        raise ConfigError(f"the speculative model has {draft.vocab_size} tokens, the model {config.vocab_size}")
    if draft.n_positions < max_model_len:
        raise ConfigError(f"the speculative model has {draft.n_positions} positions, fewer than {max_model_len}")
    return str(directory)
