"""Which directory a model argument means: a directory, a Hugging Face id, or nothing: the embedded default."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub as hub  # what is in it is imported where it is asked for: 10 MB that a directory does without

import model
from model.adapter_config import is_adapter, read_adapter_config
from model.errors import ModelError
from server.hub import advice, names_on_hub

EMBEDDED = Path(model.__file__).parent / "default"
EMBEDDED_NAME = "gpt2-server-default"
FILES = [
    "config.json", "*.safetensors", "*.safetensors.index.json", "vocab.json", "merges.txt", "tokenizer.json",
    "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.model",
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json",
    "chat_template.jinja",
]  # fmt: skip


PICKLED = (".bin", ".pt", ".pth", ".ckpt")
CONVERTED = (*PICKLED, ".gguf", ".h5", ".msgpack", ".index")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    directory: Path
    name: str  # what the model is called unless the operator says otherwise
    revision: str | None  # the commit, where the directory came from the Hub


def find_checkpoint(model_argument: str | None, revision: str | None) -> Checkpoint:
    """Downloads what is not in the Hub's cache yet. Raises ModelError."""
    if model_argument is None:
        return Checkpoint(EMBEDDED, EMBEDDED_NAME, None)
    directory = Path(model_argument).expanduser()
    if directory.is_dir():
        if is_adapter(directory) and not os.path.lexists(directory / "config.json"):
            raise ModelError(_served_beside(model_argument, directory))
        _check_format(directory, model_argument)
        return Checkpoint(directory.resolve(), directory.resolve().name, None)
    if directory.is_file():
        raise ModelError(f"{model_argument!r} is a file; make a directory of it that is served: {_convert(directory)}")
    if directory.exists() or model_argument.count("/") > 1 or model_argument.startswith((".", "~")):
        raise ModelError(f"{model_argument!r} is no directory")
    return _from_hub(model_argument, revision)


def _served_beside(argument: str, directory: Path) -> str:
    base = read_adapter_config(directory).base or "ITS_MODEL"
    return (
        f"{argument!r} is a LoRA adapter and no model; serve its model with the adapter beside it: "
        f"gpt2-server serve {shlex.quote(base)} --lora-modules {shlex.quote(f'{directory.resolve().name}={argument}')}"
    )


def _check_format(directory: Path, argument: str) -> None:
    """Raises ModelError where it holds weights of other formats, and no safetensors."""
    names = os.listdir(directory)
    if any(name.endswith(".safetensors") for name in names) or "model.safetensors.index.json" in names:
        return
    found = sorted(name for name in names if name.endswith(CONVERTED) or name == "hparams.json")
    if found:
        pickled = any(name.endswith(PICKLED) for name in found)
        kind = "pickled, which can execute code" if pickled else f"in another format ({found[0]})"
        raise ModelError(f"{argument!r} is {kind}; make of it what is served: {_convert(directory)}")


def _convert(source: Path) -> str:
    return f"gpt2-server convert {shlex.quote(str(source))} NEW_DIR"


def _from_hub(repo: str, revision: str | None) -> Checkpoint:
    try:
        directory = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=FILES, ignore_patterns=["*/*"]))
    except hub.errors.HFValidationError:
        raise ModelError(f"{repo!r} is neither a directory nor a Hugging Face id") from None
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"{repo!r} is no directory, and the Hugging Face Hub did not give it ({_kind(error)})"
        ) from None
    if not any(directory.glob("*.safetensors")):
        raise ModelError(advice(repo, names_on_hub(repo, directory.name)))
    return Checkpoint(directory, repo, directory.name)


def _kind(error: Exception) -> str:
    return type(error).__name__
