"""OpenAI's 2019 release, and gpt-2-simple's checkpoints, which have the same names: TensorFlow with hparams.json.

Source: https://github.com/openai/gpt-2 (src/model.py, src/encoder.py), https://github.com/minimaxir/gpt-2-simple.
"""

from __future__ import annotations

import re
from pathlib import Path

from model.conversion.layout import LazyTensor, Source, gpt2_config
from model.conversion.tensor_bundle import read_bundle
from model.errors import ConversionError
from model.files import CONFIG_BYTES, read_object, read_text

_NAMES = {"w": "weight", "b": "bias", "g": "weight"}
_TENSOR = re.compile(r"model/(?:h(?P<layer>\d+)/(?P<part>\w+(?:/c_\w+)?)|(?P<final>ln_f))/(?P<kind>[wbg])")
_KEYS = {"n_layer", "n_head", "n_embd", "n_ctx", "n_vocab"}


def open_openai(path: Path) -> Source:
    """path: of hparams.json, or of the index of one checkpoint beside it. Raises ConversionError."""
    hparams = _hparams(path.with_name("hparams.json"))
    index = path if path.suffix == ".index" else _latest(path.parent)
    stored, files = read_bundle(index)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        if name in ("model/wte", "model/wpe"):
            tensors[f"{name[6:]}.weight"] = tensor
            continue
        match = _TENSOR.fullmatch(name)
        if match is None:
            if name.startswith("model/") and not name.endswith(("/Adam", "/Adam_1")):
                raise ConversionError(f"it has {name[:60]}, which is no tensor of GPT-2")
            continue  # of an optimiser
        place = match["final"] or f"h.{match['layer']}.{match['part'].replace('/', '.')}"
        shape = tensor.shape[1:] if tensor.shape[:1] == (1,) and len(tensor.shape) == 3 else tensor.shape
        tensors[f"{place}.{_NAMES[match['kind']]}"] = tensor.reshaped(shape)
    config = gpt2_config(
        layers=hparams["n_layer"],
        heads=hparams["n_head"],
        width=hparams["n_embd"],
        positions=hparams["n_ctx"],
        tokens=hparams["n_vocab"],
        activation="gelu_new",
    )
    return Source("TensorFlow checkpoint of OpenAI's GPT-2", config, tensors, files)


def _hparams(path: Path) -> dict[str, int]:
    found = read_object(path, CONFIG_BYTES, ConversionError)
    if any(type(found.get(key)) is not int or found[key] <= 0 for key in _KEYS):
        raise ConversionError(f"hparams.json has to give {', '.join(sorted(_KEYS))}")
    return {key: found[key] for key in _KEYS}


def _latest(directory: Path) -> Path:
    """The checkpoint that TensorFlow's own list names last, or the only one."""
    if (directory / "checkpoint").is_file():
        match = re.search(
            r'^model_checkpoint_path: "([^"]+)"',
            read_text(directory / "checkpoint", CONFIG_BYTES, ConversionError),
            re.MULTILINE,
        )
        if match is not None:
            return directory / f"{Path(match[1]).name}.index"
    found = sorted(directory.glob("*.index"))
    if len(found) != 1:
        raise ConversionError(
            f"beside hparams.json there are {len(found)} checkpoints: name the .index of the one that is meant"
        )
    return found[0]
