"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), forward only.

A straight line from token ids to hidden states to logits, over a paged KV cache. Knows nothing of sampling, of
requests, or of who owns a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from model.adapters import AdaptedRows, adapted_linear
from model.batch import Batch
from model.config import Activation, ModelConfig
from model.kv_cache import KVCache, LayerCache
from model.linear import Linear
from model.ops import Norm, Ops
from model.sampling_row import SamplingRow
from model.scores import Scores
from model.step import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Layer:
    number: int
    norm_1: Norm
    attend_in: Linear  # n_embd -> 3 * n_embd: queries, keys, values
    attend_out: Linear
    norm_2: Norm
    mlp_in: Linear
    mlp_out: Linear
    scale: float

    def __call__(self, hidden: Tensor, cache: LayerCache, batch: Batch, ops: Ops, activation: Activation) -> Tensor:
        """hidden: (rows, n_embd), the residual stream before the layer; returns it after."""
        qkv = self.attend_in(self.norm_1(hidden))
        ops.write_kv(qkv, cache, batch.slots)
        hidden = self.attend_out(ops.attention(qkv, cache, batch, self.scale), residual=hidden)
        return self.mlp_out(self.mlp_in(self.norm_2(hidden), activation=activation), residual=hidden)

    def adapted(
        self,
        hidden: Tensor,
        cache: LayerCache,
        batch: Batch,
        ops: Ops,
        activation: Activation,
        adapted: Sequence[AdaptedRows],
    ) -> Tensor:
        """As `__call__`, where some rows have an adapter."""
        i = self.number
        qkv = adapted_linear((i, "attn.c_attn"), self.attend_in, self.norm_1(hidden), adapted)
        ops.write_kv(qkv, cache, batch.slots)
        mixed = ops.attention(qkv, cache, batch, self.scale)
        hidden = adapted_linear((i, "attn.c_proj"), self.attend_out, mixed, adapted, residual=hidden)
        wide = adapted_linear((i, "mlp.c_fc"), self.mlp_in, self.norm_2(hidden), adapted, activation=activation)
        return adapted_linear((i, "mlp.c_proj"), self.mlp_out, wide, adapted, residual=hidden)


UNLIKELY = -1e4  # the logit of a token that a short head does not know: finite, should nothing else be allowed


class GPT2:
    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], ops: Ops, head_tokens: int | None = None
    ) -> None:
        """weights: the tensors of `weights.expected_shapes`; `ops` places and packs them.

        head_tokens: how many ids the head knows, the first; None for all. For drafts: byte-level BPE numbers its
        tokens as it made them, the frequent ones first, and the head is most of what a small network reads.
        """
        self.config = config
        self._ops = ops
        self._layers = [_layer(config, weights, i, ops) for i in range(config.n_layer)]
        self._final_norm = _norm(config, weights, "ln_f", ops)
        tied = config.tie_word_embeddings
        head = weights["wte.weight" if tied else "lm_head.weight"][:head_tokens]
        self._unknown = config.vocab_size - len(head)
        self._head = ops.head(head)
        shared = self._head if tied and not self._unknown else None
        self._embed = ops.embedding(weights["wte.weight"], weights["wpe.weight"], shared)
        self._fused: tuple[KVCache, Callable[[Batch], Tensor] | None] | None = None  # of the cache seen last

    def forward(self, batch: Batch, cache: KVCache, adapted: Sequence[AdaptedRows] = ()) -> Tensor:
        """Compute a step's tokens and store their keys and values.

        The cache may have more layers than the network. Returns hidden states (wanted rows, n_embd), good until the
        next call.
        """
        if adapted:
            return self._layer_by_layer(batch, cache, adapted)
        if self._fused is None or self._fused[0] is not cache:
            self._fused = cache, self._ops.fuse(self._embed, self._layers, cache, self.config.activation)
        fused = self._fused[1]
        return self._layer_by_layer(batch, cache, ()) if fused is None else fused(batch)

    def _layer_by_layer(self, batch: Batch, cache: KVCache, adapted: Sequence[AdaptedRows]) -> Tensor:
        hidden = self._embed(batch)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=False):
            rest = layer_cache, batch, self._ops, self.config.activation
            hidden = layer.adapted(hidden, *rest, adapted) if adapted else layer(hidden, *rest)
        return hidden if batch.wanted is None else hidden[batch.wanted.rows]

    def final(self, hidden: Tensor) -> Tensor:
        """(rows, n_embd) of `forward` after the last norm: what the head sees."""
        return self._final_norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, n_embd) of `forward` to (rows, vocab) in fp32, good until the next call."""
        logits = self._head(self._final_norm(hidden)).float()
        return F.pad(logits, (0, self._unknown), value=UNLIKELY) if self._unknown else logits

    @property
    def parameters_read(self) -> int:
        """About so many of its numbers are read in a step of one row."""
        return self.config.parameters - self._unknown * self.config.n_embd

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> tuple[list[int | None], list[TokenLogprobs | None]]:
        """As `model.sampling.sample`."""
        return self._ops.sample(logits, rows)

    def score(self, logits: Tensor, tokens: Tensor, tops: Sequence[int | None]) -> Scores:
        """As `model.scores.score`."""
        return self._ops.score(logits, tokens, tops)


def _layer(config: ModelConfig, weights: Mapping[str, Tensor], i: int, ops: Ops) -> Layer:
    def conv1d(name: str) -> Linear:  # Hugging Face's Conv1D keeps (in, out): transposed once, here
        return ops.linear(weights[f"h.{i}.{name}.weight"].T, weights[f"h.{i}.{name}.bias"])

    return Layer(
        number=i,
        norm_1=_norm(config, weights, f"h.{i}.ln_1", ops),
        attend_in=conv1d("attn.c_attn"),
        attend_out=conv1d("attn.c_proj"),
        norm_2=_norm(config, weights, f"h.{i}.ln_2", ops),
        mlp_in=conv1d("mlp.c_fc"),
        mlp_out=conv1d("mlp.c_proj"),
        scale=config.attention_scale(i),
    )


def _norm(config: ModelConfig, weights: Mapping[str, Tensor], name: str, ops: Ops) -> Norm:
    return ops.norm(weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_epsilon)
