"""Models of other formats become the ones they were: the same bits and text; what cannot be is said in a line."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import model
from model.conversion.__main__ import rewrite
from model.errors import ModelError
from server.cli import main

EMBEDDED = Path(model.__file__).parent / "default"
Write = Callable[[GPT2LMHeadModel, Path], None]


def make_network(activation: str = "gelu_new", **more: Any) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 50257}
    network = GPT2LMHeadModel(GPT2Config(activation_function=activation, **{**shape, **more})).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return network


@pytest.fixture(scope="module")
def network() -> GPT2LMHeadModel:
    return make_network()


def saved(network: GPT2LMHeadModel, directory: Path, *, vocabulary: bool = True) -> None:
    """As transformers 4 saved by default: pickled."""
    network.config.architectures = ["GPT2LMHeadModel"]
    network.config.save_pretrained(directory)
    if vocabulary:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(EMBEDDED / name, directory)


def pytorch_bin(network: GPT2LMHeadModel, directory: Path) -> None:
    saved(network, directory)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for i in range(2)}
    torch.save({**network.state_dict(), **masks}, directory / "pytorch_model.bin")


def pytorch_before_2020(network: GPT2LMHeadModel, directory: Path) -> None:
    saved(network, directory)
    named = foreign.weights(network)  # of a GPT2Model
    torch.save(named, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def pytorch_shards(network: GPT2LMHeadModel, directory: Path) -> None:
    saved(network, directory)
    state = network.state_dict()
    names = sorted(state)
    files = {name: f"pytorch_model-0000{1 + (i > 9)}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name].clone() for name in names if files[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def pytorch_wrapped(network: GPT2LMHeadModel, directory: Path) -> None:
    saved(network, directory)
    state = {f"module._orig_mod.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, directory / "weights.pt")


def h5(network: GPT2LMHeadModel, directory: Path) -> None:
    saved(network, directory)
    foreign.tf_h5(network, directory / "tf_model.h5")


def flax(network: GPT2LMHeadModel, directory: Path) -> None:
    saved(network, directory)
    foreign.flax_msgpack(network, directory / "flax_model.msgpack")


def flax_in_chunks(network: GPT2LMHeadModel, directory: Path) -> None:
    saved(network, directory)
    foreign.flax_msgpack(network, directory / "flax_model.msgpack", chunk_bytes=1 << 16)


def openai(network: GPT2LMHeadModel, directory: Path) -> None:
    foreign.openai_checkpoint(network, directory)
    shutil.copy(EMBEDDED / "vocab.json", directory / "encoder.json")
    shutil.copy(EMBEDDED / "merges.txt", directory / "vocab.bpe")


SOURCES: dict[str, tuple[Write, str]] = {  # and the activation of its kind
    "pytorch_model.bin": (pytorch_bin, "gelu_new"),
    "pytorch_model.bin before 2020": (pytorch_before_2020, "gelu_new"),
    "pytorch_model.bin in shards": (pytorch_shards, "gelu_new"),
    "wrapped state dict": (pytorch_wrapped, "gelu_new"),
    "nanoGPT": (lambda n, d: foreign.nanogpt(n, d / "ckpt.pt"), "gelu"),
    "nanoGPT, compiled": (lambda n, d: foreign.nanogpt(n, d / "ckpt.pt", prefix="_orig_mod."), "gelu"),
    "nanoGPT, fine-tuned GPT-2": (lambda n, d: foreign.nanogpt(n, d / "ckpt.pt", tokens=50257), "gelu"),
    "build-nanogpt": (lambda n, d: foreign.build_nanogpt(n, d / "model_19072.pt"), "gelu_new"),
    "llm.c": (lambda n, d: foreign.llmc(n, d / "gpt2_124M.bin"), "gelu_new"),
    "GGUF": (lambda n, d: foreign.gguf_file(n, EMBEDDED, d / "gpt2-f32.gguf"), "gelu_new"),
    "tf_model.h5": (h5, "gelu_new"),
    "flax_model.msgpack": (flax, "gelu_new"),
    "flax_model.msgpack, large arrays": (flax_in_chunks, "gelu_new"),
    "OpenAI's release": (openai, "gelu_new"),
    "gpt-2-simple": (lambda n, d: foreign.openai_checkpoint(n, d, "model-1000"), "gelu_new"),
}


def greedy_text(network: GPT2LMHeadModel, directory: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("The harbour master wrote:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = network.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=50256, eos_token_id=None)
    return str(tokenizer.decode(said[0]))


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_bits_and_the_same_text(name: str, network: GPT2LMHeadModel, tmp_path: Path) -> None:
    write, activation = SOURCES[name]
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    made.mkdir()
    write(network, source)
    rewrite(source, made)
    assert same_weights(network, made)
    found = GPT2LMHeadModel.from_pretrained(made).eval()
    assert found.config.activation_function == activation
    assert (found.config.n_head, found.config.n_positions, found.config.vocab_size) == (2, 64, 50257)
    network.config.activation_function = activation
    original = make_network(activation)
    assert greedy_text(found, made) == greedy_text(original, EMBEDDED)
    digests = json.loads((made / "SOURCE.json").read_text())["sha256"]
    assert digests
    for file, digest in digests.items():
        assert digest == hashlib.sha256((source / file).read_bytes()).hexdigest()


def same_weights(network: GPT2LMHeadModel, directory: Path) -> bool:
    stored = load_file(directory / "model.safetensors")
    expected = {f"transformer.{name}": tensor for name, tensor in foreign.weights(network).items()}
    return stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in stored)


def test_a_network_without_biases_has_zeros_for_them(network: GPT2LMHeadModel, tmp_path: Path) -> None:
    foreign.nanogpt(network, tmp_path / "ckpt.pt", bias=False)
    made = tmp_path / "made"
    made.mkdir()
    rewrite(tmp_path / "ckpt.pt", made)
    for name, tensor in load_file(made / "model.safetensors").items():
        expected = foreign.weights(network)[name.removeprefix("transformer.")]
        assert torch.equal(tensor, torch.zeros_like(expected) if name.endswith(".bias") else expected)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("F16", 0.002), ("BF16", 0.01), ("Q8_0", 0.02), ("Q4_0", 0.2), ("Q5_1", 0.1)]
)
def test_numbers_of_fewer_bits(kind: str, tolerance: float, tmp_path: Path) -> None:
    """What has 16 bits keeps its kind and every bit; what is quantised becomes fp32."""
    network = make_network(vocab_size=300)
    foreign.gguf_file(network, few_tokens(tmp_path), tmp_path / "model.gguf", kind)
    made = tmp_path / "made"
    made.mkdir()
    rewrite(tmp_path / "model.gguf", made)
    stored = load_file(made / "model.safetensors")
    expected = foreign.weights(network)["h.1.mlp.c_fc.weight"]
    found = stored["transformer.h.1.mlp.c_fc.weight"]
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert found.dtype == dtype
    if dtype != torch.float32:
        assert torch.equal(found, expected.to(dtype))
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


def few_tokens(directory: Path) -> Path:
    """The bytes and some more of GPT-2's tokens; without merges."""
    tokens = list(json.loads((EMBEDDED / "vocab.json").read_text("utf-8")))[:299]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return directory


def test_llmc_in_bfloat16_keeps_every_bit(network: GPT2LMHeadModel, tmp_path: Path) -> None:
    foreign.llmc(network, tmp_path / "model.bin", version=5)
    made = tmp_path / "made"
    made.mkdir()
    rewrite(tmp_path / "model.bin", made)
    for name, tensor in load_file(made / "model.safetensors").items():
        assert torch.equal(tensor, foreign.weights(network)[name.removeprefix("transformer.")].bfloat16())


def test_a_head_of_its_own_stays_one(tmp_path: Path) -> None:
    """Also where the description says, or leaves out, that it is tied."""
    network = make_network(vocab_size=300, tie_word_embeddings=False)
    made = tmp_path / "made"
    made.mkdir()
    network.config.tie_word_embeddings = True
    saved(network, tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    rewrite(tmp_path, made)
    stored = load_file(made / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], network.lm_head.weight)
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_vocabulary_that_is_not_gpt2s_has_to_be_named(tmp_path: Path) -> None:
    network = make_network(vocab_size=300)
    foreign.nanogpt(network, tmp_path / "ckpt.pt", tokens=304)
    with pytest.raises(ModelError, match=r"304 tokens.*--tokenizer DIR"):
        rewrite(tmp_path, tmp_path)
    made = tmp_path / "made"
    made.mkdir()
    rewrite(tmp_path / "ckpt.pt", made, EMBEDDED)
    assert (made / "vocab.json").read_bytes() == (EMBEDDED / "vocab.json").read_bytes()


# === By the command: in a process of its own, and all or nothing ===


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path, str], None]:
    def check(source: Path, line: str) -> None:
        destination = tmp_path / "nowhere" / "made"
        assert main(["convert", str(source), str(destination)]) == 78
        said = capsys.readouterr()
        assert line in said.err
        assert len(said.err.strip().splitlines()) == 1
        assert not said.out
        assert not destination.exists()
        assert not destination.parent.exists() or not list(destination.parent.iterdir())

    return check


def test_the_command_says_what_to_type_next(
    network: GPT2LMHeadModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.nanogpt(network, tmp_path / "ckpt.pt")
    made = tmp_path / "deep" / "made"
    assert main(["convert", str(tmp_path / "ckpt.pt"), str(made)]) == 0
    assert f"gpt2-server serve {made}" in capsys.readouterr().out
    assert same_weights(network, made)
    assert [path.name for path in made.parent.iterdir()] == ["made"]
    assert main(["convert", str(tmp_path / "ckpt.pt"), str(made)]) == 78
    assert "is there already" in capsys.readouterr().err
    assert main(["check", str(made)]) == 0
    assert "It can be served." in capsys.readouterr().out


class Attack:
    """Opened as pickles are, it calls a shell."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_not_opened(
    zipped: bool, network: GPT2LMHeadModel, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    saved(network, tmp_path)
    mark = tmp_path / "mark"
    torch.save(
        {"transformer.wte.weight": Attack(mark)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    refused(tmp_path, "asks for posix.system, which is no tensor and might execute code")
    assert not mark.exists()


def test_what_is_cut_off_or_unknown_is_said_in_a_line(network: GPT2LMHeadModel, tmp_path: Path) -> None:
    small = make_network(vocab_size=300)
    foreign.llmc(network, tmp_path / "cut.bin")
    foreign.gguf_file(small, few_tokens(tmp_path), tmp_path / "cut.gguf")
    foreign.nanogpt(network, tmp_path / "cut.pt")
    saved(network, tmp_path)
    foreign.tf_h5(network, tmp_path / "cut.h5")
    foreign.flax_msgpack(network, tmp_path / "cut.msgpack")
    openai_files = tmp_path / "openai"
    openai_files.mkdir()
    openai(network, openai_files)
    (openai_files / "model.ckpt.index").rename(openai_files / "cut.index")
    (openai_files / "model.ckpt.data-00000-of-00001").rename(openai_files / "cut.data-00000-of-00001")
    for file in (*tmp_path.glob("cut.*"), openai_files / "cut.data-00000-of-00001"):
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 2)
    (tmp_path / "noise.bin").write_bytes(b"nothing that anybody wrote" * 100)
    with (tmp_path / "bare.pkl").open("wb") as opened:
        pickle.dump({"a": 1}, opened)
    for name, line in (
        ("cut.bin", "its header asks for"),
        ("cut.gguf", "is damaged, or no GGUF"),
        ("cut.pt", "was not written by torch.save"),
        ("cut.h5", "is damaged, or no HDF5"),
        ("cut.msgpack", "was not written by flax"),
        ("openai/cut.index", "contradict each other"),
        ("noise.bin", "is in no format that is read"),
        ("bare.pkl", "was not written by torch.save"),
        ("nowhere.bin", "is not there|cannot read"),
    ):
        with pytest.raises(ModelError, match=line) as refusal:
            rewrite(tmp_path / name, tmp_path)
        assert "\n" not in str(refusal.value)
        assert str(tmp_path) not in str(refusal.value)


def test_what_is_enormous_is_said_in_a_line(tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    with (tmp_path / "sparse.bin").open("wb") as file:
        file.write(b"PK")
        file.truncate(1 << 40)
    refused(tmp_path / "sparse.bin", "was not written by torch.save")


@pytest.mark.slow
def test_a_file_that_unfolds_is_held_to_its_size(tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 28) * 8)
        archive.writestr("archive/version", b"3\n")
    refused(tmp_path / "bomb.pt", "bomb.pt")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("model.onnx", "an ONNX graph"),
        ("latest_checkpointed_iteration.txt", "a Megatron-LM checkpoint"),
        ("model.keras", "a Keras archive"),
        ("model.safetensors", "it has safetensors already"),
    ],
)
def test_what_is_not_read_is_called_what_it_is(file: str, line: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"something")
    with pytest.raises(ModelError, match=line):
        rewrite(tmp_path, tmp_path)


def test_quantised_weights_are_called_by_their_method(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="gptq's own numbers: convert the model that was quantised"):
        rewrite(tmp_path, tmp_path)


@pytest.mark.slow
def test_memory_stays_below_twice_the_file(tmp_path: Path) -> None:
    """Of a file of 500 MB: a process beside which Python and PyTorch alone are small."""
    network = make_network(n_layer=12, n_head=12, n_embd=768, n_positions=1024)
    pytorch_bin(network, tmp_path)
    size = (tmp_path / "pytorch_model.bin").stat().st_size
    script = (
        "import resource, sys; from server.cli import main; "
        f"status = main(['convert', {str(tmp_path)!r}, {str(tmp_path / 'made')!r}]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout.split()[-1]) * 1024 < 2 * size
    assert same_weights(network, tmp_path / "made")


@pytest.mark.parametrize(("library", "start"), [("gguf", b"GGUF\x03\0\0\0"), ("h5py", b"\x89HDF\r\n\x1a\n")])
def test_a_library_that_is_missing_is_asked_for_by_name(
    library: str, start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "file").write_bytes(start)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"library {library}: pip install 'gpt2-server\[convert\]'"):
        rewrite(tmp_path / "file", tmp_path)
