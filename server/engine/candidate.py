"""One candidate answer to one prompt: what the worker has said of it so far.

It remembers every token, so that a new worker can go on where a dead one stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from model.sampling_params import SamplingParams
from model.step import PromptLogprobs, TokenLogprobs
from server.engine.output import ChoiceOutput
from server.engine.request import ChoiceDelta, GenerationRequest, Prompt
from server.worker.messages import FinishReason, Sample, SequenceOutput, Submit


class Candidate:
    def __init__(self, id_: int, prompt: Prompt, params: SamplingParams, output: ChoiceOutput, *, echo: bool) -> None:
        """id_: the sequence's name between api process and worker."""
        self.id = id_
        self.prompt = prompt
        self.params = params
        self.choice = 0  # which of the samples of its prompt it is
        self.seed: int | None = None  # of its prompt's random numbers; None for that of the parameters
        self.continued = False  # others go on from where it ends
        self.tokens: list[int] = []
        self.cached_tokens = 0
        self.finish: FinishReason | None = None
        self.worker: int | None = None  # the one that computes it; None while there is none
        self.place = 0  # among the messages sent to that worker
        self._output = output
        self._echo_due = echo
        self._logprob_sum = 0.0
        self._prompt_rows: list[TokenLogprobs] = []

    @property
    def mean_logprob(self) -> float:
        """What best_of ranks by."""
        return self._logprob_sum / max(len(self.tokens), 1)

    def take(self, said: SequenceOutput) -> Iterator[ChoiceDelta]:
        """What a step said becomes text. Look at `finish` afterwards: a stop string may have ended the candidate."""
        if said.cached_tokens is not None and not self.tokens:
            self.cached_tokens = said.cached_tokens
        if said.prompt_logprobs is not None:
            self._take_prompt_rows(said.prompt_logprobs)
        if said.token is None and said.finish is None:
            return
        scores = self._scores_due()
        if self._echo_due:
            self._echo_due = False
            yield replace(self._output.echo(scores), prompt_logprobs=scores)
            scores = None
        tokens = [] if said.token is None else [said.token]
        self.tokens += tokens
        rows = [] if said.logprobs is None else [said.logprobs]
        self._logprob_sum += sum(row.logprob for row in rows)
        delta = self._output.push(tokens, rows, said.finish, said.stop_token)
        self.finish = delta.finish_reason
        more = scores is not None or said.pooled is not None
        yield replace(delta, prompt_logprobs=scores, pooled=said.pooled) if more else delta

    def _scores_due(self) -> list[TokenLogprobs] | None:
        """The prompt's scores, where they are asked for, once: they go with the first delta."""
        if self.params.prompt_logprobs is None or self.tokens:
            return None
        return self._prompt_rows

    def _take_prompt_rows(self, scored: PromptLogprobs) -> None:
        """A worker that resumes scores the prompt again from its start: keep each row once."""
        known = len(self._prompt_rows) + 1 - scored.start  # the row of position p is number p - 1
        assert known >= 0
        self._prompt_rows += scored.rows[known:]


def submission(request: GenerationRequest, candidates: Sequence[Candidate]) -> Submit:
    """What a worker needs to compute the rest of these; their parameters are the same object."""
    prompts = {id(candidate.prompt): candidate.prompt.token_ids for candidate in candidates}
    places = {id_: place for place, id_ in enumerate(prompts)}
    return Submit(
        params=candidates[0].params,
        prompts=list(prompts.values()),
        samples=[_sample(each, places[id(each.prompt)]) for each in candidates],
        priority=request.priority,
        continued=candidates[0].continued,
        owner=request.key_name,
        salt=request.cache_salt,
        variant=None if request.variant is None else request.variant.key,
    )


def _sample(candidate: Candidate, prompt: int) -> Sample:
    return Sample(
        id=candidate.id, prompt=prompt, choice=candidate.choice, seed=candidate.seed, output=list(candidate.tokens)
    )
