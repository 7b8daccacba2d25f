"""Every setting, declared once: its type, its default, its flag and its help. Read once, frozen, then sliced.

Order of precedence: command line, environment (`GPT2_SERVER_*`), `--config` file (TOML), default.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tomllib
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from server.errors import SettingsError

ENV_PREFIX = "GPT2_SERVER_"
RETIRED_MODELS = (
    "text-davinci-002", "text-davinci-003", "davinci", "curie", "babbage", "ada", "gpt-3.5-turbo-instruct",
)  # fmt: skip
# What Kubernetes and Docker set for a Service or a link called gpt2-server, or gpt2-server-anything:
# https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables
SERVICE_LINK = re.compile(
    r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT=\w+://.*|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*)", re.DOTALL
)
OpenPath = Literal["/metrics", "/openapi.json", "/version", "/ping", "/load", "/v1/models"]


def _flag(group: str, text: str, default: Any, **limits: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"group": group}, **limits)


def _rare(text: str, default: Any, **limits: Any) -> Any:
    """Environment or file only: what few operators will ever change. docs/cli.md has them all."""
    return Field(default, description=text, **limits)


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # Model
    model: str | None = Field(
        default=None, description="a directory, a Hugging Face id, or nothing: the embedded default"
    )
    revision: str | None = _flag("model", "revision of a Hugging Face id", None)
    served_model_name: list[str] = _flag("model", "name(s) the model answers to; the first is the one shown", [])
    alias: list[str] = _rare("further names that mean the model", list(RETIRED_MODELS))
    device: str = _flag("model", "auto, cpu, cuda or cuda:N", "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag("model", "number format of the weights", "auto")
    quantization: Literal["int8"] | None = _flag(
        "model", "int8 keeps the weights in 8 bits, on a CPU: faster and smaller; default: as --dtype says", None
    )
    max_model_len: int | None = _flag("model", "context length in tokens; default: the model's", None, ge=2)
    chat_template: str | None = _flag(
        "model", "file of a Jinja template, which makes a prompt of a chat; auto takes the model's own", None
    )
    eos_token_id: list[int] = _flag("model", "tokens that end a text, and no others; default: as its files say", [])

    lora_modules: list[str] = _flag(
        "model", "LoRA adapters, or fine-tuned models like the model, to serve beside it: name=directory", []
    )
    lora_modules_gib: float = _rare(
        "memory for these, in GiB; those used least lately are given up, and read again when needed",
        2.0,
        gt=0,
    )

    # Server
    host: str = _flag("server", "address to listen on", "127.0.0.1")
    port: int = _flag("server", "port to listen on; 0 takes a free one", 8000, ge=0, le=65535)
    api_key: SecretStr | None = Field(
        default=None, description="key clients must send; environment or file only", repr=False
    )
    api_key_file: str | None = _flag("server", "file of keys, one `name: key` a line; SIGHUP reads it again", None)
    open_paths: list[OpenPath] = _flag("server", "paths that need no key, beside /health and /ready", [])
    playground: bool = _flag("server", "serve the playground, a page to try the model, at /", True)
    allowed_origins: list[str] = _rare("origins that CORS lets in; none by default", [])
    shutdown_timeout: float = _flag("server", "seconds running requests get to finish after SIGTERM", 30, ge=0, le=3600)
    head_timeout: float = _rare("seconds a request's head may take to arrive", 10, gt=0, le=600)
    body_timeout: float = _rare("seconds a request's body may take to arrive", 30, gt=0, le=3600)
    keep_alive_timeout: float = _rare("seconds an idle connection is kept", 15, gt=0, le=3600)
    write_timeout: float = _rare("seconds a client may take to read a part of its answer", 60, gt=0, le=3600)
    max_connections: int = _rare("connections at once; beyond it the one that has been idle longest goes", 12000, ge=1)
    log_level: Literal["debug", "info", "warning", "error"] = _flag("server", "how much to log", "info")

    # Files and jobs
    data_dir: str | None = _flag(
        "server",
        "directory of files, batches, fine-tuning jobs and what they make; default: none, and no such routes",
        None,
    )
    database_url: SecretStr | None = _flag(
        "server",
        "postgresql+psycopg://… for several servers with one --data-dir (with a password, use the variable); "
        "default: SQLite in --data-dir",
        None,
        repr=False,
    )
    max_file_bytes: int = _rare("bytes of an uploaded file", 512 << 20, ge=1024)
    batch_lines_at_once: int = _rare(
        "lines of batches that are computed at once, behind everything else", 8, ge=1, le=4096
    )
    training_device: str = _rare(
        "where fine-tuning jobs run: auto, cpu, cuda or cuda:N", "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$"
    )
    training_threads: int | None = _rare("threads of a fine-tuning job; default: half of the cores", None, ge=1)

    # Engine
    workers: int = _flag(
        "engine",
        "worker processes, each with the whole model; they share the cores and the KV cache's bound, "
        "or with --device cuda have a device each",
        1,
        ge=1,
        le=64,
    )
    max_num_seqs: int = _flag("engine", "sequences computed at once by a worker", 64, ge=1, le=4096)
    max_num_batched_tokens: int = _flag("engine", "tokens computed in one step", 256, ge=16, le=65536)
    target_itl: float | None = _flag(
        "engine",
        "seconds between two tokens of a running stream, to which the tokens of a step adapt, "
        "up to --max-num-batched-tokens; default: every step may take them all",
        None,
        gt=0,
    )
    block_size: int = _flag("engine", "tokens in one block of the KV cache", 16, ge=8, le=256)
    kv_cache_gib: float | None = _flag(
        "engine",
        "upper bound of the KV cache, in GiB, of all workers together; "
        "default: 2, and on a GPU what --gpu-memory-utilization leaves",
        None,
        gt=0,
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "engine", "number format of the KV cache; auto is the weights', and float16 beside int8", "auto"
    )
    gpu_memory_utilization: float = _flag("engine", "share of a GPU's memory that may be in use", 0.9, gt=0, le=1)
    deterministic: bool = _flag(
        "engine", "on a GPU, give the same bytes whatever else is in the batch; a CPU always does", False
    )
    enable_prefix_caching: bool = _flag("engine", "share the KV cache of equal prompt beginnings", True)
    kernels: Literal["auto", "off", "portable", "avx2", "avx512", "vnni"] = _flag(
        "engine", "C kernels for the CPU: auto, off (PyTorch alone), or an instruction set", "auto"
    )
    threads: int | None = _flag(
        "engine", "threads of a worker; default: its share of the cores this process may use", None, ge=1
    )
    stall_timeout: float = _flag(
        "engine", "seconds a worker that has work may make no step before it is replaced", 30, ge=1, le=3600
    )

    # Speculation
    speculative_method: Literal["off", "ngram", "model"] = _flag(
        "speculation",
        "guess tokens and verify many at a time: ngram looks them up in the text so far, "
        "model asks --speculative-model; it changes no answer",
        "off",
    )
    speculative_model: str | None = _flag(
        "speculation", "smaller model of the same vocabulary that guesses; a directory or a Hugging Face id", None
    )
    num_speculative_tokens: int = _rare("most tokens guessed at a time", 5, ge=1, le=32)

    # Limits
    request_timeout: float = _flag("limits", "seconds a request may take, its wait included", 600, gt=0, le=86400)
    max_tokens_per_minute: int | None = _flag(
        "limits", "tokens of prompts and completions a key may use in a minute; default: any number", None, ge=1
    )
    max_num_queued_reqs: int = _flag("limits", "requests that may wait for their first token", 256, ge=1)
    max_num_queued_tokens: int = _rare("prompt tokens that may wait", 65536, ge=1)
    clamp_max_tokens: bool = _flag(
        "limits",
        "cut a max_tokens that does not fit to what the prompt leaves of the context, instead of an error",
        False,
    )
    json_whitespace: Literal["bounded", "any", "none"] = _rare(
        "white space in JSON by a schema: as json.dumps writes it, any (small models may never end), or none", "bounded"
    )
    max_logprobs: int = _flag("limits", "largest logprobs a request may ask for", 20, ge=0, le=1000)
    max_choices: int = _rare("largest n", 128, ge=1, le=128)
    max_best_of: int = _rare("largest best_of", 20, ge=1, le=128)
    max_sequences: int = _rare("largest prompts x max(n, best_of) of one request", 128, ge=1)
    max_stop_strings: int = _rare("stop strings in one request", 16, ge=1, le=256)
    max_stop_length: int = _rare("characters in one stop string", 256, ge=1)
    max_head_bytes: int = _rare("bytes in the head of a request", 32 << 10, ge=1024, le=1 << 20)
    max_headers: int = _rare("headers of a request", 100, ge=8)
    max_body_bytes: int = _rare("bytes in one request body", 1 << 20, ge=1024)

    @model_validator(mode="after")
    def _check_jobs(self) -> Settings:
        if self.database_url is not None and self.data_dir is None:
            raise ValueError("a database_url needs a data_dir, which has the files")
        return self

    @model_validator(mode="after")
    def _check_speculation(self) -> Settings:
        if (self.speculative_method == "model") != (self.speculative_model is not None):
            raise ValueError("speculative_method model and a speculative_model need each other")
        return self


def flags(parser: argparse.ArgumentParser) -> None:
    """Adds `[MODEL]`, `--config` and a flag for each setting that is not rare, grouped, to a parser."""
    parser.epilog = f"Each is a variable too ({ENV_PREFIX}PORT); rarer ones are only that. docs/cli.md lists all."
    parser.add_argument("model", nargs="?", metavar="MODEL", help=Settings.model_fields["model"].description)
    parser.add_argument("--config", metavar="FILE", help="TOML file of the settings below")
    groups: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict):
            group = str(extra["group"])
            target = groups.setdefault(group, parser.add_argument_group(group))
            _add_flag(target, name, field)


def some_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds `--config` and the flags of these settings; the others still come from the environment and the file."""
    for name in names:
        _add_flag(parser, name, Settings.model_fields[name])
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings, as for serve")


def _add_flag(group: Any, name: str, field: FieldInfo) -> None:
    flag = "--" + name.replace("_", "-")
    shown = field.default if not isinstance(field.default, list) else " ".join(field.default) or "none"
    text = f"{field.description}" + ("" if shown is None else f" [{shown}]")
    if field.annotation is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, default=None)
    elif isinstance(field.default, list):
        group.add_argument(flag, nargs="*", metavar="NAME", help=text)
    else:
        group.add_argument(flag, metavar=name.rsplit("_", 1)[-1].upper(), help=text)


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Raises SettingsError."""
    given = {name: value for name, value in vars(arguments).items() if name in Settings.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        settings = Settings(**{**_read_file(arguments.config), **_environment(given.keys()), **given})
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None
    for secret in ("API_KEY", "DATABASE_URL"):  # no process that is started from here needs them
        os.environ.pop(f"{ENV_PREFIX}{secret}", None)
    return settings


def _environment(overruled: Set[str]) -> dict[str, Any]:
    """What the variables say, without those that a flag overrules. One that is empty is not set.

    Raises SettingsError for one that is no setting.
    """
    found: dict[str, Any] = {}
    for variable, text in sorted(os.environ.items()):
        bare = variable.removeprefix(ENV_PREFIX)
        if bare == variable or not text or SERVICE_LINK.fullmatch(f"{bare}={text}"):
            continue
        name = bare.lower()
        if name not in Settings.model_fields:
            raise SettingsError(f"environment variable {variable} is no setting of this server")
        if name not in overruled:
            found[name] = _words(text) if isinstance(Settings.model_fields[name].default, list) else text
    return found


def _words(text: str) -> Any:
    """A list in a variable: JSON, or words between commas."""
    try:
        return json.loads(text)
    except ValueError:
        return [word for each in text.split(",") if (word := each.strip())]


def _read_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the config file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the config file is not TOML: {error}") from None


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    return f"setting {name}: {first['msg'][0].lower()}{first['msg'][1:]}"


def parse(argv: Sequence[str]) -> Settings:
    """What `gpt2-server serve` reads; for tests and tools that have no parser of their own."""
    parser = argparse.ArgumentParser()
    flags(parser)
    return read_settings(parser.parse_args(argv))
