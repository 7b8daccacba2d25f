"""Adapters and whole networks beside the model: peft's logits, and in any batch the bits each has alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driving import BLOCK_SIZE, CPU, Tables, greedy
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from model.adapter_file import read_lora
from model.config import read_config
from model.errors import AdapterError, ConfigError, ModelError
from model.gpt2 import GPT2
from model.kernels.library import KernelsUnavailableError, load
from model.kv_cache import KVCache
from model.loading import choose_ops
from model.ops import Ops
from model.runner import Runner
from model.sampling_params import SamplingParams
from model.step import NewSequence, SampledToken, ScheduledChunk, StepPlan
from model.variants import Variants
from model.weights import read_weights

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
TARGETS = [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["mlp.c_proj"], ["c_fc"]]


@pytest.fixture(scope="module")
def base(make_checkpoint: Make) -> tuple[Path, GPT2LMHeadModel]:
    return make_checkpoint()


@pytest.fixture(scope="module")
def adapters(base: tuple[Path, GPT2LMHeadModel], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four of peft's, of different ranks and targets; large enough to change what is said."""
    directory, _ = base
    made = []
    for i, targets in enumerate(TARGETS):
        config = LoraConfig(r=2 + i, lora_alpha=8, target_modules=targets, fan_in_fan_out=True, use_rslora=i == 2)
        torch.manual_seed(i)
        model = get_peft_model(GPT2LMHeadModel.from_pretrained(directory), config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(0.3 * torch.randn_like(weight))
        made.append(tmp_path_factory.mktemp("adapter"))
        model.save_pretrained(made[-1])
    return made


@pytest.fixture(params=["off", "fp32", "int8"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "off":
        return choose_ops(CPU, torch.float32, "off")
    try:
        load()
    except KernelsUnavailableError:
        pytest.skip("the C kernels were not built")
    return choose_ops(CPU, torch.float32, "auto", None if request.param == "fp32" else request.param)


class Served:
    """A runner with variants, driven by hand: prompts in one chunk, then a token a step."""

    def __init__(self, directory: Path, ops: Ops, variants: list[Path]) -> None:
        config = read_config(directory)
        self.network = GPT2(config, read_weights(directory, config), ops)
        self.variants = Variants(self.network, ops, 1 << 30, directory)
        self.cache = KVCache(config, 256, BLOCK_SIZE, ops.kv_dtypes[0], CPU)
        for i, each in enumerate(variants):
            self.variants.register(f"v{i}", each)
            self.variants.use(f"v{i}", frozenset())
        self.runner = Runner(self.network, self.cache, CPU, config.n_positions, variants=self.variants)

    def generate(self, jobs: list[tuple[str | None, list[int], SamplingParams]]) -> list[list[SampledToken]]:
        tables = Tables(256)
        outputs: list[list[SampledToken]] = [[] for _ in jobs]
        added = [NewSequence(i, prompt, [], params, name) for i, (name, prompt, params) in enumerate(jobs)]
        while live := [i for i, (_, _, params) in enumerate(jobs) if len(outputs[i]) < params.max_tokens]:
            chunks = []
            for i in live:
                total = len(jobs[i][1]) + len(outputs[i])
                start = total - 1 if outputs[i] else 0
                first, blocks = tables.grow(i, total)
                chunks.append(ScheduledChunk(i, start, total - start, first, blocks, True))
            for sampled in self.runner.run(StepPlan([], added, chunks)).sampled:
                outputs[sampled.id].append(sampled)
            added = []
        self.runner.forget(list(range(len(jobs))))
        return outputs


def jobs(names: list[str | None]) -> list[tuple[str | None, list[int], SamplingParams]]:
    """Lengths and numbers of tokens differ, so that the batch changes from step to step."""
    return [
        (
            name,
            [(7 * i + 3 * k) % 500 for k in range(5 + 9 * i)],
            SamplingParams(seed=i, max_tokens=6 + 3 * i, temperature=0.9, logprobs=3),
        )
        for i, name in enumerate(names)
    ]


def test_each_of_a_mixed_batch_has_the_bits_it_has_alone(
    base: tuple[Path, GPT2LMHeadModel], adapters: list[Path], ops: Ops
) -> None:
    served = Served(base[0], ops, adapters)
    names = [None, "v0", "v1", None, "v2", "v3", "v1"]
    together = served.generate(jobs(names))
    for job, output in zip(jobs(names), together, strict=True):
        (alone,) = served.generate([job])
        assert [(token.token, token.logprobs) for token in alone] == [(each.token, each.logprobs) for each in output]
    plain = Served(base[0], ops, []).generate([job for job in jobs(names) if job[0] is None])
    assert [[t.logprobs for t in output] for output in plain] == [
        [t.logprobs for t in output] for output, name in zip(together, names, strict=True) if name is None
    ]
    assert len({tuple(token.token for token in served.generate([(name, *jobs([None])[0][1:])])[0])
                for name in (None, "v0", "v1", "v2", "v3")}) == 5  # fmt: skip


def test_adapters_say_what_peft_says(base: tuple[Path, GPT2LMHeadModel], adapters: list[Path]) -> None:
    directory, _ = base
    tokens = [(11 * k) % 500 for k in range(60)]
    served = Served(directory, choose_ops(CPU, torch.float32, "auto"), adapters)
    vocab = served.network.config.vocab_size
    scoring = greedy(1, prompt_logprobs=vocab - 1)
    for i, adapter in enumerate(adapters):
        tables = Tables(256)
        first, blocks = tables.grow(0, len(tokens))
        chunk = ScheduledChunk(0, 0, len(tokens), first, blocks, True)
        scored = served.runner.run(
            StepPlan([], [NewSequence(0, tokens, [], scoring, f"v{i}")], [chunk])
        ).prompt_logprobs
        served.runner.forget([0])
        theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(directory), adapter).eval()
        with torch.no_grad():
            expected = torch.log_softmax(theirs(torch.tensor([tokens])).logits[0], -1)
        for position, row in enumerate(scored[0].rows):
            ours = dict(row.top)
            values = torch.tensor([ours[token] for token in sorted(ours)])
            torch.testing.assert_close(values, expected[position][sorted(ours)], atol=1e-4, rtol=0)


def test_whole_networks_share_a_batch(make_checkpoint: Make, base: tuple[Path, GPT2LMHeadModel], ops: Ops) -> None:
    """Another head, and half the layers: each says what it says by itself."""
    shallow = make_checkpoint(n_layer=1)[0]
    untied = make_checkpoint(tie_word_embeddings=False)[0]
    served = Served(base[0], ops, [shallow, untied])
    names = [None, "v0", "v1", "v0", None]
    together = served.generate(jobs(names))
    for directory, name in ((base[0], None), (shallow, "v0"), (untied, "v1")):
        by_itself = Served(directory, ops, [])
        for job, output in zip(jobs(names), together, strict=True):
            if job[0] == name:
                (alone,) = by_itself.generate([(None, *job[1:])])
                assert [(t.token, t.logprobs) for t in alone] == [(t.token, t.logprobs) for t in output]


def test_the_least_recently_used_goes_first(base: tuple[Path, GPT2LMHeadModel], adapters: list[Path]) -> None:
    ops = choose_ops(CPU, torch.float32, "off")
    config = read_config(base[0])
    network = GPT2(config, read_weights(base[0], config), ops)
    roomy = Variants(network, ops, 1 << 30, base[0])
    for i in range(3):
        roomy.register(f"v{i}", adapters[i])
    sizes = [roomy.use(f"v{i}", frozenset()).bytes for i in range(3)]
    assert roomy.bytes == sum(sizes)
    tight = Variants(network, ops, max(sizes[0] + sizes[1], sizes[1] + sizes[2]), base[0])
    for i in range(3):
        tight.register(f"v{i}", adapters[i])
    first, second = tight.use("v0", frozenset()), tight.use("v1", frozenset())
    tight.use("v2", frozenset())
    assert tight.use("v1", frozenset()) is second
    assert tight.use("v0", frozenset({"v1", "v2"})) is not first
    assert tight.bytes == sum(sizes)  # all in use: the bound yields
    tight.forget("v1")
    with pytest.raises(ModelError):
        tight.use("v1", frozenset())


def test_what_does_not_fit_is_refused(
    make_checkpoint: Make, base: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    ops = choose_ops(CPU, torch.float32, "off")
    config = read_config(base[0])
    variants = Variants(GPT2(config, read_weights(base[0], config), ops), ops, 1 << 30, base[0])
    wide = make_checkpoint(n_embd=32)[0]
    model = get_peft_model(
        GPT2LMHeadModel.from_pretrained(wide), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    model.save_pretrained(tmp_path)
    variants.register("wide", wide)
    variants.register("adapter", tmp_path)
    with pytest.raises(ConfigError, match="n_embd is 64 and not 32: serve it by itself"):
        variants.use("wide", frozenset())
    with pytest.raises(AdapterError, match=r"h.0.attn.c_attn does not fit the model"):
        variants.use("adapter", frozenset())
    assert variants.bytes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "a LOHA one"),
        ({"use_dora": True, "lora_bias": True}, "DoRA with biases"),
        ({"bias": "some"}, "bias must be one of"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be"),
        ({"brand_new": True}, "unknown here .brand_new."),
        ({"r": 0}, "r must be"),
        ({"lora_alpha": "much"}, "lora_alpha must be"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(
    base: tuple[Path, GPT2LMHeadModel], adapters: list[Path], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    raw = json.loads((adapters[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(AdapterError, match=message):
        read_lora(tmp_path, read_config(base[0]))


def test_damaged_tensors_are_refused(base: tuple[Path, GPT2LMHeadModel], adapters: list[Path], tmp_path: Path) -> None:
    config = read_config(base[0])
    shutil.copy(adapters[0] / "adapter_config.json", tmp_path)
    with pytest.raises(AdapterError, match=r"cannot read adapter_model\.safetensors"):
        read_lora(tmp_path, config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="is damaged"):
        read_lora(tmp_path, config)
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    name = next(iter(tensors))
    for changed, message in (
        ({**tensors, name: torch.full_like(tensors[name], torch.nan)}, "NaN"),
        ({**tensors, "base_model.model.pooler.lora_A.weight": tensors[name].clone()}, "of no module"),
        ({key: tensor for key, tensor in tensors.items() if key != name}, "one matrix"),
    ):
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=message):
            read_lora(tmp_path, config)
