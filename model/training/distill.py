"""Knowledge distillation (Hinton et al. 2015), with the terms of DistilBERT (Sanh et al. 2019) and MiniLM.

A student learns the teacher's whole distribution over the next token, softened by a temperature, instead of the one
token that the text has. Other terms pull its last hidden states and its attention towards the teacher's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.errors import JobError
from model.training.job import Distillation
from model.training.loss import CHUNK_ELEMENTS, Tally
from model.training.network import Network, Trace
from model.training.packing import PADDING, Packed


def make_student(teacher: Network, layers: int | None) -> Network:
    """The teacher with fewer layers: first and last, and evenly between; DistilGPT-2 took 0, 2, 4, 7, 9, 11 of 12.

    Raises JobError where it has not so many.
    """
    have = teacher.config.n_layer
    layers = layers or max(1, have // 2)
    if layers > have:
        raise JobError(f"a student of {layers} layers cannot be copied from a teacher of {have}")
    student = Network(replace(teacher.config, n_layer=layers))
    weights = {name: tensor for name, tensor in teacher.state_dict().items() if ".h." not in name}
    for layer, source in enumerate(copied_layers(have, layers)):
        prefix = f"transformer.h.{source}."
        for name, tensor in teacher.state_dict().items():
            if name.startswith(prefix):
                weights[f"transformer.h.{layer}.{name.removeprefix(prefix)}"] = tensor
    student.load_state_dict(weights)
    return student


def copied_layers(have: int, layers: int) -> list[int]:
    return [math.floor(i * (have - 1) / max(layers - 1, 1) + 0.5) for i in range(layers)]


def check_pair(teacher: ModelConfig, student: ModelConfig, job: Distillation) -> None:
    """Raises JobError where the teacher cannot teach the student what the job asks for."""
    if teacher.vocab_size != student.vocab_size:
        raise JobError(f"the teacher has {teacher.vocab_size} tokens, the student {student.vocab_size}")
    if teacher.n_positions < student.n_positions:
        raise JobError(f"the teacher has {teacher.n_positions} positions, the student {student.n_positions}")
    if job.hidden and teacher.n_embd != student.n_embd:
        raise JobError("hidden states can be compared only where teacher and student have one width")
    if job.attention and teacher.n_head != student.n_head:
        raise JobError("attention can be compared only where teacher and student have as many heads")
    if job.attention and teacher.n_layer < student.n_layer:
        raise JobError("attention can be compared only where the teacher has as many layers as the student")


class Distiller:
    """`tuner.Objective`: the weighted mean of the job's terms."""

    parts = 1

    def __init__(self, teacher: Network, job: Distillation) -> None:
        self._teacher = teacher.requires_grad_(False)
        self._job = job

    def size(self, batch: Packed) -> int:
        return len(batch.targets)

    def __call__(self, network: Network, batch: Packed, dtype: torch.dtype, tally: Tally | None = None) -> Tensor:
        job = self._job
        traces = (Trace(), Trace()) if job.attention else (None, None)
        with torch.no_grad():
            taught = self._teacher.packed(batch, traces[0])
        hidden = network.packed(batch, traces[1])
        loss = _mixed_loss(hidden, network.head, taught, self._teacher.head, batch.targets, job, dtype, tally)
        if job.hidden:
            loss = loss + job.hidden * (1 - F.cosine_similarity(hidden.float(), taught.float(), dim=1)).mean()
        if traces[0] is not None and traces[1] is not None:
            loss = loss + job.attention * _attention_loss(traces[0], traces[1], batch)
        return loss / (job.soft + job.hard + job.hidden + job.attention)


def _attention_loss(teacher: Trace, student: Trace, batch: Packed) -> Tensor:
    """Mean over layers, heads and tokens of the divergence between where the two look."""
    mask, real = batch.mask(), batch.owners != PADDING
    pairs = copied_layers(len(teacher.scores), len(student.scores))
    losses = []
    for scores, source in zip(student.scores, pairs, strict=True):
        wanted = teacher.scores[source].float().masked_fill(~mask, -torch.inf).softmax(-1)
        log = scores.float().masked_fill(~mask, -torch.inf).log_softmax(-1).masked_fill(~mask, 0.0)
        entropy = torch.special.entr(wanted).sum(-1)
        losses.append((-(wanted * log).sum(-1) - entropy).mean(1)[real].mean())  # over heads, then tokens
    return torch.stack(losses).mean()


# === The terms that need logits ===


class _MixedLoss(torch.autograd.Function):
    """Soft and hard cross entropy in chunks of rows, their gradients computed on the way; see loss.py."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, taught: Tensor, teacher_head: Tensor, targets: Tensor,
        job: Distillation, dtype: torch.dtype, tally: Tally | None,
    ) -> Tensor:  # fmt: skip
        columns, teacher_columns = head.to(dtype), teacher_head.to(dtype)
        inputs, taught = hidden.to(dtype), taught.to(dtype)
        learns_hidden, learns_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(inputs) if learns_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if learns_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(1, CHUNK_ELEMENTS // head.shape[0])
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = (inputs[rows] @ columns.t()).float()  # (chunk, vocabulary)
            teacher_logits = (taught[rows] @ teacher_columns.t()).float()
            if tally is not None:
                wanted = targets[rows].unsqueeze(1)
                tally.add(int((logits.gather(1, wanted) == logits.amax(1, keepdim=True)).sum()), len(logits))
            loss, grad = _rows_loss(logits, teacher_logits, targets[rows], job)
            total += loss
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ columns
            if grad_head is not None:
                grad_head += grad.t() @ inputs[rows]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.tokens, ctx.hidden_dtype = len(targets), hidden.dtype
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = outputs[0] / ctx.tokens
        to_hidden = None if grad_hidden is None else grad_hidden.to(ctx.hidden_dtype) * scale
        return to_hidden, None if grad_head is None else grad_head * scale, None, None, None, None, None, None


def _rows_loss(logits: Tensor, teacher: Tensor, targets: Tensor, job: Distillation) -> tuple[Tensor, Tensor]:
    """Summed over rows, and its gradient: `hard (p - target) + soft T (p_T - q_T)` of logits `(rows, vocabulary)`.

    In place, for the passes over such matrices are what distillation costs.
    """
    loss = torch.zeros((), device=logits.device)
    grad = torch.zeros_like(logits) if job.hard or not job.soft else None
    if job.hard and grad is not None:
        wanted = targets.unsqueeze(1)
        normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
        loss = loss + job.hard * (normaliser - logits.gather(1, wanted)).sum()
        torch.sub(logits, normaliser, out=grad).exp_()
        grad.scatter_add_(1, wanted, torch.full_like(normaliser, -1.0)).mul_(job.hard)
    if job.soft:
        divergence, soft = _divergence(logits, teacher, job.temperature)
        loss = loss + job.soft * divergence
        soft.mul_(job.soft)
        grad = soft if grad is None else grad.add_(soft)
    assert grad is not None
    return loss, grad


def _divergence(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`T^2 KL(teacher || student)` summed over rows, and its gradient. Both `(rows, vocabulary)` are used up."""
    if temperature != 1.0:
        logits.div_(temperature)
        teacher.div_(temperature)
    logits.sub_(torch.logsumexp(logits, dim=1, keepdim=True))
    teacher.sub_(torch.logsumexp(teacher, dim=1, keepdim=True))
    soft_targets = teacher.exp()
    divergence = torch.dot(soft_targets.flatten(), teacher.sub_(logits).flatten())
    return divergence * temperature**2, logits.exp_().sub_(soft_targets).mul_(temperature)


def _mixed_loss(
    hidden: Tensor, head: Tensor, taught: Tensor, teacher_head: Tensor, targets: Tensor,
    job: Distillation, dtype: torch.dtype, tally: Tally | None,
) -> Tensor:  # fmt: skip
    loss: Tensor = _MixedLoss.apply(hidden, head, taught, teacher_head, targets, job, dtype, tally)  # type: ignore[no-untyped-call]
    return loss
