"""A model directory may hold anything: what is no model is said in one line, at once, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from serving import check_refused, start
from tokenizers import Tokenizer as TheirTokenizer
from tokenizers import models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from vocabularies import write_model, write_unigram, write_wordpiece

from model.adapter_config import CONFIG_FILE, WEIGHTS_FILE
from model.adapter_file import read_adapter
from model.adapters import LowRank, adapter_tensors
from model.config import parse_config, read_config
from model.errors import ConfigError, ModelError, TokenizerError
from model.tokenizer import read_tokenizer
from model.weights import INDEX_FILE, expected_shapes, read_weights

SECONDS = 20
READ = """
import resource, signal, sys
from pathlib import Path
from model.adapter_file import read_adapter
from model.config import read_config
from model.errors import ModelError
from model.tokenizer import read_tokenizer
from model.weights import read_weights

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
for directory in map(Path, sys.argv[1:]):
    signal.alarm(SECONDS)
    try:
        config = read_config(directory)
        read_tokenizer(directory, config.vocab_size, config.eos_token_ids)
        read_weights(directory, config)
        read_adapter(directory, config)
        print("read")
    except ModelError as error:
        print(str(error).replace("\\n", "\\\\n"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture(scope="module")
def models_by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model with an adapter for each kind of vocabulary."""
    made = {}
    kinds = (("bytes", write_bytes, 257), ("wordpiece", write_wordpiece, 3), ("unigram", write_unigram, 3))
    for kind, write, end in kinds:
        directory = made[kind] = tmp_path_factory.mktemp(kind)
        write_model(directory, write(directory), eos_token_id=end)
        write_adapter(directory)
    return made


def write_bytes(directory: Path) -> int:
    vocab = {character: id_ for id_, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {"ab": 256, "<|endoftext|>": 257}
    (directory / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\na b\n", "utf-8")
    return len(vocab)


def write_adapter(directory: Path) -> None:
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (directory / CONFIG_FILE).write_text(json.dumps(described))
    weights = read_weights(directory, read_config(directory))["h.0.attn.c_attn.weight"]  # (in, out)
    pair = LowRank(weights[:, :2].T, weights[:2].T, 2.0)
    save_file(adapter_tensors({(0, "attn.c_attn"): pair}), directory / WEIGHTS_FILE)


# === What is no regular file ===


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def vast(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 << 30)  # of zeros, none of which takes room


def empty(path: Path) -> None:
    path.touch()


ODD: list[Callable[[Path], None]] = [zeros, fifo, folder, dangling, loop, vast, empty]
MAY_BE = ("tokenizer_config.json", "merges.txt-empty")  # without it a model is whole


def test_every_file_of_a_model_directory_is_a_regular_one_of_bounded_size(
    models_by_kind: dict[str, Path], tmp_path: Path
) -> None:
    """One that hangs or takes memory ends the process that reads, and so fails here."""
    cases = []
    for kind, directory in models_by_kind.items():
        for file in sorted(path.name for path in directory.iterdir()):
            for odd in ODD:
                copy = Path(shutil.copytree(directory, tmp_path / f"{kind}-{file}-{odd.__name__}"))
                (copy / file).unlink()
                odd(copy / file)
                cases.append(copy)
    command = [sys.executable, "-c", f"SECONDS = {SECONDS}\n{READ}", *map(str, cases)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS * 3)
    *lines, growth = done.stdout.splitlines()
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        assert (line == "read") <= any(name in case.name for name in MAY_BE), case.name
        assert str(tmp_path) not in line
        assert "\\n" not in line
    assert int(growth) < 300 << 10  # KiB


def test_a_file_nobody_may_read_is_said_to_be_that(models_by_kind: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's own are for their owner alone
        copy = Path(shutil.copytree(models_by_kind["bytes"], Path(made) / "model"))
        for path in (copy.parent, copy):
            path.chmod(0o755)
        config = read_config(copy)
        for name in ("model.safetensors", WEIGHTS_FILE):
            (copy / name).chmod(0)
        with as_nobody():
            with pytest.raises(ModelError, match=r"cannot read model\.safetensors: Permission denied"):
                read_weights(copy, config)
            with pytest.raises(ModelError, match=rf"cannot read {WEIGHTS_FILE}: Permission denied"):
                read_adapter(copy, config)


class as_nobody:  # noqa: N801  (read as a phrase)
    """Root may read everything."""

    def __enter__(self) -> None:
        self._user = os.geteuid()
        if self._user == 0:
            os.seteuid(65534)

    def __exit__(self, *error: object) -> None:
        os.seteuid(self._user)


@pytest.mark.parametrize("file", ["config.json", "vocab.json", "model.safetensors"])
def test_serve_says_so_in_one_line_and_status_78(file: str, models_by_kind: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models_by_kind["bytes"], tmp_path / "model"))
    (copy / file).unlink()
    fifo(copy / file)
    line = "neither vocab.json" if file == "vocab.json" else f"cannot read {file}: it is not a regular file"
    check_refused(start(copy), line)


def test_shards_are_opened_as_the_single_file_is(models_by_kind: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models_by_kind["bytes"], tmp_path / "model"))
    (copy / "model.safetensors").unlink()
    for name, line in (("a.safetensors", "not a regular file"), ("..", "does not name"), (["a"], "does not name")):
        (copy / INDEX_FILE).write_text(json.dumps({"weight_map": {"wte.weight": name}}))
        (copy / "a.safetensors").unlink(missing_ok=True)
        fifo(copy / "a.safetensors")
        with pytest.raises(ModelError, match=line):
            read_weights(copy, read_config(copy))


# === What their contents may be ===


def check_line(error: ModelError) -> None:
    assert "\n" not in str(error)


def test_a_shape_that_no_gpt2_has_is_refused_before_anything_is_made_of_it() -> None:
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
    for name in (*shape, "n_inner"):
        with pytest.raises(ConfigError, match=f"{name} is more than this server takes"):
            parse_config({**shape, name: 10_000_000})


def test_a_boolean_is_no_token(models_by_kind: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models_by_kind["bytes"], tmp_path / "model"))
    vocab = json.loads((copy / "vocab.json").read_text("utf-8"))
    (copy / "vocab.json").write_text(json.dumps({**vocab, next(k for k, v in vocab.items() if v == 1): True}))
    with pytest.raises(TokenizerError, match="does not hold a vocabulary"):
        read_tokenizer(copy, 258, (257,))


NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 64, 100, 2**31, 2**40, 2**63 - 1, 2**64, -1])
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "F4", "C64", "X"]),
        "shape": st.lists(NUMBERS, max_size=4),
        "data_offsets": st.tuples(NUMBERS, NUMBERS).map(list),
    }
)


@st.composite
def hostile_safetensors(draw: st.DrawFn, names: list[str]) -> bytes:
    """A header with what no writer writes, under a length that may be another."""
    header = json.dumps(draw(st.dictionaries(st.sampled_from(names), TENSOR, max_size=3))).encode()
    header = draw(st.sampled_from([header, header[:-1], header * 2, b"[" * 5000, b"{}", b""]))
    length = draw(st.sampled_from([len(header), len(header) + 1, 0, 1, 2**24 + 1, 99_000_000, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + header + bytes(draw(st.sampled_from([0, 1, 8, 100])))


@settings(max_examples=150)
@given(data=st.data())
def test_any_safetensors_file_is_read_or_refused(data: st.DataObject, models_by_kind: dict[str, Path]) -> None:
    directory = models_by_kind["bytes"]
    config = read_config(directory)
    names = ["transformer.wte.weight", "wpe.weight", *list(expected_shapes(config))[:6], "__metadata__", "other\nline"]
    names += [f"base_model.model.transformer.h.{n}.attn.c_attn.lora_A.weight" for n in (0, 1, "0" * 5000, "²")]
    with tempfile.TemporaryDirectory() as made:
        copy = Path(shutil.copytree(directory, made, dirs_exist_ok=True))
        raw = data.draw(hostile_safetensors(names))
        for file, read in (("model.safetensors", read_weights), (WEIGHTS_FILE, read_adapter)):
            (copy / file).write_bytes(raw)
            try:
                read(copy, config)
            except ModelError as error:
                check_line(error)


SCRAPS = st.sampled_from(
    [None, True, False, 0, 1, -1, 3, 2**31, 2**40, 1e30, "", "a", "[UNK]", "\ud800", [], [[]], ["a"], {}, {"a": 1}]
)


def mutated(value: Any, draw: st.DrawFn) -> Any:
    """With one place, anywhere in it, replaced, removed or added to."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 5)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys[:30]))
        copy = value.copy()
        if draw(st.booleans()) and draw(st.booleans()):
            del copy[key]
        else:
            copy[key] = mutated(value[key], draw)
        return copy
    return draw(SCRAPS)


@pytest.fixture(scope="module")
def described_in_json(models_by_kind: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same models, and some whose vocabulary is in a tokenizer.json."""
    bytes_ = TheirTokenizer.from_str(
        json.dumps(byte_level_json(json.loads((models_by_kind["bytes"] / "vocab.json").read_text("utf-8"))))
    )
    wordpiece = TheirTokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[SEP]": 3}, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    unigram = TheirTokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("▁b", -2.0), ("</s>", 0.0)], 0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    made = []
    for whole in (bytes_, wordpiece, unigram):
        whole.add_special_tokens(["<extra>"])
        directory = tmp_path_factory.mktemp("json")
        kind = "bytes" if whole is bytes_ else "wordpiece"
        (directory / "config.json").write_bytes((models_by_kind[kind] / "config.json").read_bytes())
        whole.save(str(directory / "tokenizer.json"))
        made.append(directory)
    return [*models_by_kind.values(), *made]


def byte_level_json(vocab: dict[str, int]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "added_tokens": [{"id": 257, "content": "<|endoftext|>", **flags}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]},
    }


@settings(max_examples=150)
@given(data=st.data())
def test_any_json_of_a_model_directory_is_read_or_refused(data: st.DataObject, described_in_json: list[Path]) -> None:
    directory = data.draw(st.sampled_from(described_in_json))
    path = data.draw(st.sampled_from(sorted(directory.glob("*.json"))))
    value = mutated(json.loads(path.read_text("utf-8")), data.draw)
    with tempfile.TemporaryDirectory() as made:
        copy = Path(shutil.copytree(directory, made, dirs_exist_ok=True))
        (copy / path.name).write_text(json.dumps(value), "utf-8")
        try:
            config = read_config(copy)
            tokenizer = read_tokenizer(copy, config.vocab_size, config.eos_token_ids)
            tokenizer.decode(tokenizer.encode("ab b [SEP] <extra>"))
            if (copy / CONFIG_FILE).is_file():
                read_weights(copy, config)
                read_adapter(copy, config)
        except ModelError as error:
            check_line(error)
