"""Which format a source is in, by its content first. What is not read is named for what it is, with the way out."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from model.conversion import flax, gguf_reading, keras, llmc, openai
from model.conversion.layout import Source, regular_size
from model.conversion.pickles import INDEX_FILE, open_pytorch, open_pytorch_shards
from model.errors import ConversionError
from model.files import CONFIG_BYTES, read_object

Open = Callable[[Path], Source]

_NAMED: tuple[tuple[str, Open], ...] = (  # in a directory, the first that is there
    (INDEX_FILE, open_pytorch_shards),
    ("pytorch_model.bin", open_pytorch),
    ("flax_model.msgpack", flax.open_flax),
    ("tf_model.h5", keras.open_keras),
    ("hparams.json", openai.open_openai),
    ("ckpt.pt", open_pytorch),
)
_PATTERNS = ("*.gguf", "*.pt", "*.pth", "*.ckpt", "*.bin")  # otherwise the only file of its kind
_THROUGH_TRANSFORMERS = "load it with the library that wrote it, and save it as a GPT2LMHeadModel with save_pretrained"
_UNREAD = (
    (
        "latest_checkpointed_iteration.txt",
        "a Megatron-LM checkpoint; Megatron's own tools convert it to Hugging Face's",
    ),
    ("mp_rank_*", "a Megatron-LM checkpoint; Megatron's own tools convert it to Hugging Face's"),
    ("global_step*", "a DeepSpeed checkpoint; zero_to_fp32.py beside it makes a pytorch_model.bin of it"),
    ("*.onnx", "an ONNX graph, which has no weights by name: convert the model that it was exported from"),
    ("saved_model.pb", f"a TensorFlow SavedModel: {_THROUGH_TRANSFORMERS}"),
    ("*.keras", f"a Keras archive: {_THROUGH_TRANSFORMERS}"),
    ("rust_model.ot", "weights for Rust: convert the pytorch_model.bin that they were made from"),
)


def files_of(source: Path) -> list[Path]:
    """The files that reading it may open. Raises ConversionError."""
    if not source.exists():
        raise ConversionError(f"{source.name} is not there")
    if source.is_dir():
        return [path for path in source.iterdir() if path.is_file()]
    return [source]


def open_source(source: Path) -> Source:
    """A file or a directory. Raises ModelError."""
    return _open_directory(source) if source.is_dir() else _open_file(source)


def _open_directory(directory: Path) -> Source:
    _refuse_quantised(directory)
    for name, open_ in _NAMED:
        if (directory / name).exists():
            return open_(directory / name)
    if any(directory.glob("*.index")):
        raise ConversionError("beside a TensorFlow checkpoint there has to be its hparams.json")
    for pattern, what in _UNREAD:
        if any(directory.glob(pattern)):
            raise ConversionError(f"it is {what}")
    if any(directory.glob("*.safetensors")):
        raise ConversionError(f"it has safetensors already: gpt2-server serve {directory.name}")
    for pattern in _PATTERNS:
        found = sorted(directory.glob(pattern))
        if len(found) > 1:
            raise ConversionError(f"it holds {len(found)} files {pattern}: name the one that is meant")
        if found:
            return _open_file(found[0])
    raise ConversionError("it holds no weights in a format that is read")


def _open_file(path: Path) -> Source:
    for pattern, what in _UNREAD:
        if path.match(pattern):
            raise ConversionError(f"it is {what}")
    if regular_size(path) < 8:
        raise ConversionError(f"{path.name} is cut off")
    with path.open("rb") as file:
        start = file.read(8)
    number = struct.unpack_from("<i", start)[0]
    if start.startswith(b"GGUF"):
        return gguf_reading.open_gguf(path)
    if start.startswith(b"\x89HDF"):
        return keras.open_keras(path)
    if number == llmc.MAGIC:
        return llmc.open_llmc(path)
    if number in (llmc.TOKENIZER_MAGIC, llmc.STATE_MAGIC):
        raise ConversionError(f"{path.name} is llm.c's, but holds no model")
    if path.suffix == ".safetensors":
        raise ConversionError("it is safetensors already: gpt2-server serve its directory")
    if path.suffix == ".msgpack":
        return flax.open_flax(path)
    if path.suffix == ".index":
        return openai.open_openai(path)
    if start.startswith((b"PK", b"\x80")):  # a zip archive, or a bare pickle
        return open_pytorch(path)
    raise ConversionError(f"{path.name} is in no format that is read")


def _refuse_quantised(directory: Path) -> None:
    """A description that asks for a library's own numbers."""
    path = directory / "config.json"
    if not path.exists():
        return
    quantised = read_object(path, CONFIG_BYTES, ConversionError).get("quantization_config")
    if isinstance(quantised, dict):
        method = str(quantised.get("quant_method", "quantised"))[:20]
        raise ConversionError(f"its weights are {method}'s own numbers: convert the model that was quantised")
