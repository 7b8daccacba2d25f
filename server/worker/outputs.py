"""What the api process is told of a step, sequence by sequence. Knows nothing of plans, blocks or other sequences."""

from __future__ import annotations

from model.step import PromptLogprobs, SampledToken
from server.worker.messages import FinishReason, SequenceOutput
from server.worker.sequence import Sequence


def told(sequence: Sequence, samples: list[SampledToken], rows: PromptLogprobs | None) -> list[SequenceOutput]:
    """Append a step's tokens, up to the one that ends the sequence, if any does."""
    outputs: list[SequenceOutput] = []
    for sample in samples:
        outputs.append(output(sequence, sample, rows, _append(sequence, sample)))
        rows = None
        if outputs[-1].finish is not None:
            break
    return outputs


def _append(sequence: Sequence, sample: SampledToken) -> FinishReason | None:
    """Whether the sequence is at its end. Where no token was left for it, it is, with what it has."""
    return FinishReason.STOP if sample.token is None else sequence.append(sample.token, sample.grammar)


def output(
    sequence: Sequence,
    sample: SampledToken | None,
    rows: PromptLogprobs | None,
    finish: FinishReason | None,
    pooled: bytes | None = None,
) -> SequenceOutput:
    """One message about a sequence. What its prompt found in the cache is told once, with the first."""
    cached_tokens, sequence.cached_tokens = sequence.cached_tokens, None
    said = sample is not None and sample.token is not None
    return SequenceOutput(
        id=sequence.id,
        token=None if sample is None else sample.token,
        logprobs=None if sample is None else sample.logprobs,
        prompt_logprobs=rows,
        pooled=pooled,
        finish=finish,
        stop_token=sequence.stop_token if finish is FinishReason.STOP and said else None,
        cached_tokens=cached_tokens,
    )


def unseen(sequence: Sequence, scores: PromptLogprobs | None) -> PromptLogprobs | None:
    """The rows of a prompt that were not delivered before a preemption."""
    if scores is None or scores.start + len(scores.rows) <= sequence.scored:
        return None
    rows = scores.rows[sequence.scored - scores.start :]
    start, sequence.scored = sequence.scored, sequence.scored + len(rows)
    return PromptLogprobs(sequence.id, start, rows)
