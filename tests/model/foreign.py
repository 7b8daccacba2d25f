"""Writes a GPT-2 as other projects do: by their own library where there is one, else as they document it."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import h5py
import msgpack
import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import __main__

MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def weights(network: GPT2LMHeadModel) -> dict[str, Tensor]:
    """By transformers' names, without `transformer.` and without the tied head."""
    return {
        name.removeprefix("transformer."): tensor.detach().clone()
        for name, tensor in network.state_dict().items()
        if not name.startswith("lm_head")
    }


def linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torch's Linear keeps them: (out, in)."""
    return {n: t.T.contiguous() if n.endswith(MATRICES) else t for n, t in tensors.items()}


def padded(tensors: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    extra = torch.full((tokens - len(tensors["wte.weight"]), tensors["wte.weight"].shape[1]), 0.5)
    return {**tensors, "wte.weight": torch.cat([tensors["wte.weight"], extra])}


# === nanoGPT and build-nanogpt ===


def nanogpt(network: GPT2LMHeadModel, path: Path, *, bias: bool = True, prefix: str = "", tokens: int = 50304) -> None:
    """As train.py saves: `model_args` and the state dict of a compiled network."""
    config = network.config
    named = padded(linear(weights(network)), tokens)
    if not bias:
        named = {name: tensor for name, tensor in named.items() if not name.endswith(".bias")}
    state = {f"{prefix}transformer.{name}": tensor for name, tensor in named.items()}
    state[f"{prefix}lm_head.weight"] = named["wte.weight"]
    arguments = {
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "block_size": config.n_positions,
        "bias": bias, "vocab_size": tokens, "dropout": 0.0,
    }  # fmt: skip
    checkpoint = {
        "model": state, "optimizer": {"state": {}, "param_groups": []}, "model_args": arguments, "iter_num": 5,
        "best_val_loss": torch.tensor(2.5), "config": {"out_dir": "out", "dataset": "openwebtext"},
    }  # fmt: skip
    torch.save(checkpoint, path)


class GPTConfig:
    """As a script of its own pickles it: `__main__.GPTConfig`."""


def build_nanogpt(network: GPT2LMHeadModel, path: Path) -> None:
    config = network.config
    settings = GPTConfig()
    settings.__dict__.update(
        block_size=config.n_positions,
        vocab_size=50304,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
    )
    named = padded(linear(weights(network)), 50304)
    state = {f"transformer.{name}": tensor for name, tensor in named.items()} | {"lm_head.weight": named["wte.weight"]}
    GPTConfig.__module__ = "__main__"
    __main__.GPTConfig = GPTConfig  # type: ignore[attr-defined]  # pickle looks for it there
    try:
        torch.save({"model": state, "config": settings, "step": 19072, "val_loss": 3.1}, path)
    finally:
        del __main__.GPTConfig  # type: ignore[attr-defined]


# === llm.c ===


def llmc(network: GPT2LMHeadModel, path: Path, version: int = 3) -> None:
    """As `write_model` of train_gpt2.py: fp32 is version 3, bfloat16 version 5."""
    config = network.config
    named = padded(linear(weights(network)), 50304)
    header = np.zeros(256, np.int32)
    header[:8] = (
        20240326, version, config.n_positions, 50257, config.n_layer, config.n_head, config.n_embd, 50304
    )  # fmt: skip
    layered = [
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
        "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    ]  # fmt: skip
    names = ["wte.weight", "wpe.weight"]
    names += [f"h.{i}.{name}" for name in layered for i in range(config.n_layer)]
    names += ["ln_f.weight", "ln_f.bias"]
    dtype = torch.float32 if version == 3 else torch.bfloat16
    data = b"".join(named[name].to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for name in names)
    path.write_bytes(header.tobytes() + data)


# === GGUF ===


def gguf_file(network: GPT2LMHeadModel, vocabulary: Path, path: Path, kind: str = "F32") -> None:
    """By the `gguf` package, as llama.cpp's own converter calls it; kind: of matrices and embeddings."""
    config = network.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    ids = json.loads((vocabulary / "vocab.json").read_text("utf-8"))
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    lines = (vocabulary / "merges.txt").read_text("utf-8").splitlines()
    writer.add_token_merges([line for line in lines if line and not line.startswith("#version")])
    writer.add_bos_token_id(50256)
    writer.add_eos_token_id(50256)
    parts = {
        "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    outer = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    for name, tensor in linear(weights(network)).items():
        place, _, last = name.rpartition(".")
        if place in outer:
            theirs = f"{outer[place]}.{last}"
        else:
            _, layer, part = place.split(".", 2)
            theirs = f"blk.{layer}.{parts[part]}.{last}"
        matrix = name.endswith(MATRICES) or name == "wte.weight"
        type_ = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        data = gguf.quants.quantize(tensor.numpy(), type_) if type_ != gguf.GGMLQuantizationType.F32 else tensor.numpy()
        writer.add_tensor(theirs, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# === TensorFlow ===


def tf_h5(network: GPT2LMHeadModel, path: Path) -> None:
    """By h5py, with the groups and names of TFGPT2LMHeadModel.save_pretrained."""
    root = "transformer/tfgp_t2lm_head_model/transformer"
    with h5py.File(path, "w") as file:
        for name, tensor in weights(network).items():
            place, _, last = name.rpartition(".")
            kind = {"weight": "gamma", "bias": "beta"}[last] if "ln_" in place else last
            kind = "embeddings" if place == "wpe" else kind
            theirs = re.sub(r"^h\.(\d+)\.", r"h/\1/", place).replace(".", "/").replace("h/", "h_._", 1)
            data = tensor.numpy()
            if last == "bias" and "ln_" not in place:
                data = data[None]  # TFConv1D keeps (1, out)
            file.create_dataset(f"{root}/{theirs}/{kind}:0", data=data)


def openai_checkpoint(network: GPT2LMHeadModel, directory: Path, name: str = "model.ckpt") -> None:
    """The index and data of TensorFlow's tensor_bundle, as its header file and tensor_bundle.proto describe them."""
    config = network.config
    hparams = {
        "n_vocab": config.vocab_size, "n_ctx": config.n_positions, "n_embd": config.n_embd, "n_head": config.n_head,
        "n_layer": config.n_layer,
    }  # fmt: skip
    (directory / "hparams.json").write_text(json.dumps(hparams))
    (directory / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n')
    arrays = {}
    for ours, tensor in weights(network).items():
        place, _, last = ours.rpartition(".")
        if place in ("wte", "wpe"):
            arrays[f"model/{place}"] = tensor.numpy()
            continue
        kind = "g" if "ln_" in place and last == "weight" else last[0]
        theirs = place.replace("h.", "h", 1) if place.startswith("h.") else place
        arrays[f"model/{theirs.replace('.', '/')}/{kind}"] = (
            tensor.numpy()[None] if tensor.dim() == 2 else tensor.numpy()
        )
    write_bundle(directory / name, arrays)


def write_bundle(prefix: Path, arrays: dict[str, Any]) -> None:
    data, entries = b"", {b"": _field(1, 1) + _field(3, _field(1, 1))}
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], "<f4")
        shape = b"".join(_field(2, _field(1, size)) for size in array.shape)
        entries[name.encode()] = (
            _field(1, 1) + _field(2, shape) + _field(4, len(data)) + _field(5, array.nbytes) + b"\x35" + bytes(4)
        )
        data += array.tobytes()
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    prefix.with_name(f"{prefix.name}.index").write_bytes(_table(entries))


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _table(entries: dict[bytes, bytes]) -> bytes:
    """LevelDB's table format: blocks of a few keys each, whose starts are shared, and an index of the blocks."""
    out, index = b"", {}
    keys = sorted(entries)
    for i in range(0, len(keys), 7):
        block = _block({key: entries[key] for key in keys[i : i + 7]})
        index[keys[min(i + 6, len(keys) - 1)]] = _varint(len(out)) + _varint(len(block))
        out += block + bytes(5)
    meta = len(out), len(_block({}))
    out += _block({}) + bytes(5)
    place = len(out), len(_block(index))
    out += _block(index) + bytes(5)
    footer = b"".join(_varint(number) for number in (*meta, *place))
    return out + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def _block(entries: dict[bytes, bytes]) -> bytes:
    out, before, restarts = b"", b"", []
    for i, (key, value) in enumerate(entries.items()):
        shared = 0
        if i % 4 == 0:
            restarts.append(len(out))
        else:
            shared = next(
                (n for n, (a, b) in enumerate(zip(before, key, strict=False)) if a != b), min(len(before), len(key))
            )
        out += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
        before = key
    restarts = restarts or [0]
    return out + b"".join(struct.pack("<I", each) for each in (*restarts, len(restarts)))


# === Flax ===


def flax_msgpack(network: GPT2LMHeadModel, path: Path, chunk_bytes: int = 1 << 30) -> None:
    """By msgpack, as flax's serialization.py packs arrays: an extension of type 1; larger ones in chunks."""

    def packed(array: Any) -> Any:
        if array.nbytes <= chunk_bytes:
            content = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
            return msgpack.ExtType(1, content)
        size = max(1, chunk_bytes // array.itemsize)
        flat = array.reshape(-1)
        chunks = [flat[i : i + size] for i in range(0, flat.size, size)]
        return {
            "__msgpack_chunked_array__": True,
            "shape": {str(i): size for i, size in enumerate(array.shape)},
            "chunks": {str(i): packed(chunk) for i, chunk in enumerate(chunks)},
        }

    tree: dict[str, Any] = {}
    for name, tensor in linear(weights(network)).items():  # FlaxConv1D keeps (out, in)
        place, _, last = name.rpartition(".")
        if last == "weight":
            last = "embedding" if place in ("wte", "wpe") else "scale" if "ln_" in place else "kernel"
        node = tree
        for part in f"transformer.{place}".split("."):
            node = node.setdefault(part, {})
        node[last] = packed(tensor.numpy())
    path.write_bytes(msgpack.packb(tree, use_bin_type=True))
