"""What is served here runs elsewhere: the same numbers in llama.cpp's, nanoGPT's and transformers' files."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import model
from model.conversion.__main__ import rewrite
from model.conversion.exporting import load, write_gguf
from server.cli import main

EMBEDDED = Path(model.__file__).parent / "default"
TOKENS = [(11 * k) % 300 for k in range(40)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # in peft
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's, of tied weights and embeddings
]


def make(directory: Path, **more: Any) -> GPT2LMHeadModel:
    """A small network with the first tokens of GPT-2's vocabulary, the last of which ends a text."""
    torch.manual_seed(5)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64, "vocab_size": 300}
    network = GPT2LMHeadModel(GPT2Config(bos_token_id=299, eos_token_id=299, **{**shape, **more})).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    network.save_pretrained(directory)
    tokens = list(json.loads((EMBEDDED / "vocab.json").read_text("utf-8")))[:299]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}))
    (directory / "merges.txt").write_text("#version: 0.2\nĠ t\nĠ a\nh e\n")
    return network


def log_probabilities(network: Any) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(network(torch.tensor([TOKENS])).logits[0], -1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_comes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    """With its tokenizer: the same ids and the same text."""
    source, made = tmp_path / "source", tmp_path / "made"
    make(source, tie_word_embeddings=tied)
    assert main(["export", str(source), str(tmp_path / "model.gguf"), "--to", "gguf"]) == 0
    made.mkdir()
    rewrite(tmp_path / "model.gguf", made)
    before, after = load_file(source / "model.safetensors"), load_file(made / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((made / "config.json").read_text())
    assert (config["eos_token_id"], config["layer_norm_epsilon"]) == (299, 1e-5)
    ours, theirs = AutoTokenizer.from_pretrained(made), AutoTokenizer.from_pretrained(source)
    for text in ("the harbour at <|endoftext|> night", "caf\u00e9 \U0001f6a2 the  a"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("q8_0", 0.2)])
def test_a_gguf_of_fewer_bits_says_nearly_the_same(dtype: str, tolerance: float, tmp_path: Path) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    network = make(source)
    write_gguf(load(source, None), tmp_path / "model.gguf", dtype)
    made.mkdir()
    rewrite(tmp_path / "model.gguf", made)
    found = GPT2LMHeadModel.from_pretrained(made).eval().float()
    torch.testing.assert_close(log_probabilities(found), log_probabilities(network), atol=tolerance, rtol=0)


class NanoGPT(torch.nn.Module):
    """The network of nanoGPT's model.py, from its state dict and settings alone."""

    def __init__(self, checkpoint: dict[str, Any]) -> None:
        super().__init__()
        self.state = checkpoint["model"]
        self.settings = checkpoint["model_args"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"transformer.{name}.weight"], self.state[f"transformer.{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.state[f"transformer.{name}.weight"], self.state[f"transformer.{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        count, heads = len(tokens), self.settings["n_head"]
        x = self.state["transformer.wte.weight"][tokens] + self.state["transformer.wpe.weight"][:count]
        for i in range(self.settings["n_layer"]):
            qkv = self.linear(self.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(self.settings["n_embd"], -1)
            q, k, v = (part.view(count, heads, -1).transpose(0, 1) for part in qkv)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(count, -1)
            x = x + self.linear(mixed, f"h.{i}.attn.c_proj")
            wide = F.gelu(self.linear(self.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
            x = x + self.linear(wide, f"h.{i}.mlp.c_proj")
        logits = F.linear(self.norm(x, "ln_f"), self.state["lm_head.weight"])
        return torch.log_softmax(logits, -1)


def test_nanogpt_computes_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    network = make(source, activation_function="gelu")
    assert main(["export", str(source), str(tmp_path / "ckpt.pt"), "--to", "nanogpt"]) == 0
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    said = NanoGPT(checkpoint)(torch.tensor(TOKENS))
    torch.testing.assert_close(said, log_probabilities(network), atol=1e-4, rtol=0)
    made = tmp_path / "made"
    made.mkdir()
    rewrite(tmp_path / "ckpt.pt", made, source)
    before, after = load_file(source / "model.safetensors"), load_file(made / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("resized", [False, True])
def test_an_adapter_is_merged_into_a_model_of_its_own(resized: bool, tmp_path: Path) -> None:
    """One that brings tokens of its own too, which cannot be served beside the model."""
    source, adapter, made = tmp_path / "source", tmp_path / "adapter", tmp_path / "made"
    network = copy.deepcopy(make(source))
    if resized:
        network.resize_token_embeddings(304)
    tuned = get_peft_model(network, LoraConfig(target_modules=["c_attn"], use_dora=not resized))
    with torch.no_grad():
        for weight in (each for each in tuned.parameters() if each.requires_grad):
            weight.add_(0.1 * torch.randn_like(weight))
    tuned.save_pretrained(adapter, save_embedding_layers=resized)
    assert main(["export", str(source), str(made), "--merge", str(adapter)]) == 0
    found = GPT2LMHeadModel.from_pretrained(made).eval()
    base = GPT2LMHeadModel.from_pretrained(source)
    if resized:
        base.resize_token_embeddings(304)
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    torch.testing.assert_close(log_probabilities(found), log_probabilities(theirs), atol=1e-4, rtol=0)
    assert found.config.vocab_size == (304 if resized else 300)
    assert (made / "vocab.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "changes", "line"),
    [
        (["--to", "gguf"], {"activation_function": "relu"}, "llama.cpp computes a GPT-2 with gelu_new"),
        (["--to", "gguf"], {"scale_attn_by_inverse_layer_idx": True}, "no attention of another scale"),
        (["--to", "nanogpt"], {"tie_word_embeddings": False}, "nanoGPT has no such network"),
        (["--dtype", "q8_0"], {}, "--dtype goes with --to gguf"),
        (["--merge", "nowhere"], {}, "cannot read adapter_config.json"),
    ],
)
def test_what_others_cannot_run_is_not_written(
    arguments: list[str], changes: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "source", **changes)
    assert main(["export", str(tmp_path / "source"), str(tmp_path / "made"), *arguments]) == 78
    assert line in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_tokenizer_that_llamacpp_has_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "source")
    (tmp_path / "source" / "vocab.json").unlink()
    (tmp_path / "source" / "vocab.txt").write_text("[PAD]\n[UNK]\n[SEP]\n")
    assert main(["export", str(tmp_path / "source"), str(tmp_path / "made.gguf"), "--to", "gguf"]) == 78
    assert "this model has another" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "source")


PROMPTS = [
    "The harbour master wrote:", "Once upon a time", "The weather today is", "In the year 1851",
    "She opened the door and", "A list of things to buy:", "The history of the town begins", "def main():",
    "He said that", "Water boils at",
]  # fmt: skip
LLAMA = """
import sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.n_ctx, p.n_parallel, p.n_gpu_layers = sys.argv[1], 0, 512, 1, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.verbosity, p.fit_params, p.warmup = 0, False, False
p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_llamacpp_says_the_same(tmp_path: Path) -> None:
    """Needs `pip install xllamacpp`. Greedy, in fp32."""
    pytest.importorskip("xllamacpp")
    write_gguf(load(EMBEDDED, None), tmp_path / "model.gguf", "float32")
    network = GPT2LMHeadModel.from_pretrained(EMBEDDED).eval().float()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    with subprocess.Popen(
        [sys.executable, "-c", LLAMA, str(tmp_path / "model.gguf")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            for prompt in PROMPTS:
                asked = {"prompt": prompt, "n_predict": 32, "temperature": 0, "top_k": 1, "cache_prompt": False,
                         "ignore_eos": True, "repeat_penalty": 1.0}  # fmt: skip
                said = httpx.post(f"{url}/completion", json=asked, timeout=60).json()["content"]
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    ours = network.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
                assert said == tokenizer.decode(ours[0][ids.shape[1] :]), prompt
        finally:
            process.kill()
