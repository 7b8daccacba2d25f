"""GPT-2 as a plain autograd module, for training only.

The module tree mirrors `transformers.GPT2LMHeadModel`, so `state_dict()` has the Hugging Face names and the Conv1D
layout (weights stored as `(in, out)`) without any renaming. Serving uses another network, built for speed; this one
knows nothing of caches, batches of requests or sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import Activation, ModelConfig
from model.training.packing import Packed

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.GELU_ERF: F.gelu,
    Activation.RELU: F.relu,
    Activation.SILU: F.silu,
}


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened inside, for whoever compares two networks."""

    scores: list[Tensor] = field(default_factory=list)  # (rows, heads, length, length) before mask and softmax


class Conv1D(nn.Module):
    """An affine map whose weight is stored as `(inputs, outputs)`, as OpenAI's checkpoint has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads = config.n_head
        self.scale = config.attention_scale(layer)
        self.dropout = 0.0
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, trace: Trace | None = None) -> Tensor:
        rows, length, width = x.shape
        qkv = self.c_attn(x).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (rows, heads, length, head_dim)
        if trace is not None:
            trace.scores.append(q @ k.mT * self.scale)
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=mask is None, scale=self.scale
        )
        out: Tensor = self.c_proj(mixed.transpose(1, 2).reshape(rows, length, width))
        return out


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)
        self.c_proj = Conv1D(config.n_inner, config.n_embd)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.activation(self.c_fc(x)))
        return out


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None, trace: Trace | None = None) -> Tensor:
        x = x + F.dropout(self.attn(self.ln_1(x), mask, trace), self.dropout, self.training)
        out: Tensor = x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)
        return out


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.dropout = 0.0
        self.recompute = False  # compute a block again for its gradients: less memory, a third more time

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        x = F.dropout(self.wte(tokens) + self.wpe(positions), self.dropout, self.training)
        for block in self.h:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, trace, use_reentrant=False, preserve_rng_state=self.dropout > 0)
            else:
                x = block(x, mask, trace)
        out: Tensor = self.ln_f(x)
        return out


class Network(nn.Module):
    """GPT-2 up to its last layer norm; the head is the token embedding unless untied, and the losses apply it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """Hidden states `(rows, length, width)` of `tokens` `(rows, length)`.

        `starts` `(rows,)` is each row's first position, zero if not given: a row shorter than the context can be
        trained wherever in the context its text lies.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        if starts is not None:
            positions = positions + starts.unsqueeze(1)
        hidden: Tensor = self.transformer(tokens, positions)
        return hidden

    @property
    def head(self) -> Tensor:
        """The output embedding, `(vocabulary, width)`: the input embedding itself, if the two are tied."""
        return self.transformer.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def dropout(self) -> float:
        return self.transformer.dropout

    def set_dropout(self, share: float) -> None:
        """As GPT-2 had it while it was trained: of embeddings, of attention, and of what each layer adds."""
        for module in self.modules():
            if isinstance(module, Transformer | Block | Attention):
                module.dropout = share

    def packed(self, batch: Packed, trace: Trace | None = None) -> Tensor:
        """Hidden states `(targets, width)` where the next token is learnt."""
        hidden = self.transformer(batch.tokens, batch.positions, batch.mask(), trace)
        chosen: Tensor = hidden.flatten(0, 1)[batch.predicts]
        return chosen

    def initialise(self, generator: torch.Generator) -> None:
        """GPT-2's own scheme: N(0, 0.02), projections into the residual stream smaller by sqrt(2 × layers)."""
        residual = 0.02 / math.sqrt(2 * self.config.n_layer)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("c_proj.weight"):
                    parameter.normal_(0.0, residual, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()
                elif parameter.dim() == 2:
                    parameter.normal_(0.0, 0.02, generator=generator)
                else:
                    parameter.fill_(1.0)

    def initialise_xavier(self, generator: torch.Generator) -> None:
        """Glorot and Bengio (2010): matrices uniform, so that the variance of what flows stays that of what came."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    bound = math.sqrt(6 / sum(parameter.shape))
                    parameter.uniform_(-bound, bound, generator=generator)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
