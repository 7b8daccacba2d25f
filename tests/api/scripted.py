"""An engine that says what it is told to, by way of the real ChoiceOutput; and a vocabulary small enough to read.

Token n < 256 is the byte n, so a script is `list("text".encode())`. A few longer tokens make borders interesting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from model.byte_level import ByteLevelTokenizer
from model.sampling_params import SamplingParams
from model.step import TokenLogprobs
from server.engine.output import ChoiceOutput, TokenTexts
from server.engine.request import ChoiceDelta, GenerationRequest, Prompt, Usage
from server.worker.messages import FinishReason

WORDS = [b" t", b" th", b" the", b"he", b"ll", b"llo", b" w", "é".encode(), "適".encode()[:2]]
EOS = 300
VOCAB_SIZE = 301
CONTEXT = 64


def tokenizer() -> ByteLevelTokenizer:
    ranks = {bytes([value]): value for value in range(256)} | {word: 256 + i for i, word in enumerate(WORDS)}
    return ByteLevelTokenizer(ranks, {"<|endoftext|>": EOS}, ["<|endoftext|>"], VOCAB_SIZE)


def logprobs_of(token: int, position: int, count: int) -> TokenLogprobs:
    """Made up, but a function of the token and its place: what is scored twice scores the same."""
    top = [((position * 7 + rank * 11) % 256, -0.25 - rank / 2) for rank in range(count)]
    value = dict(top).get(token, -9.0 - token / 1000)
    return TokenLogprobs(value, top, token + 1)


Script = Callable[[Prompt, SamplingParams], list[int]]


def says(text: str | bytes, *, eos: bool = True) -> Script:
    raw = text.encode() if isinstance(text, str) else text
    return lambda _prompt, _params: [*raw, EOS] if eos else [*raw]


@dataclass
class ScriptedEngine:
    script: Script = field(default_factory=lambda: says("hello", eos=False))
    burst: int = 1  # tokens a step
    ready: bool = True
    healthy: bool = True
    refusal: Exception | None = None  # raised by submit
    failure: Exception | None = None  # raised after `fails_after` deltas
    fails_after: int = 0
    hangs: bool = False  # after its first delta, until closed
    cached_tokens: int = 0  # of each prompt
    requests: list[GenerationRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    charged: dict[str, int] = field(default_factory=dict)  # for what was refused, by key

    def check_quota(self, key_name: str) -> None:
        pass

    def charge(self, key_name: str, tokens: int) -> None:
        self.charged[key_name] = self.charged.get(key_name, 0) + tokens

    def submit(self, request: GenerationRequest) -> ScriptedGeneration:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        return ScriptedGeneration(self, request)


class ScriptedGeneration:
    def __init__(self, engine: ScriptedEngine, request: GenerationRequest) -> None:
        self._engine = engine
        self._request = request
        self._completion_tokens = 0
        self._deltas = self._run()

    def __aiter__(self) -> ScriptedGeneration:
        return self

    async def __anext__(self) -> ChoiceDelta:
        return await self._deltas.__anext__()

    @property
    def usage(self) -> Usage:
        prompts = self._request.prompts
        total = sum(len(prompt.token_ids) for prompt in prompts)
        return Usage(total, self._completion_tokens, self._engine.cached_tokens * len(prompts))

    async def aclose(self) -> None:
        self._engine.closed.append(self._request.id)
        await self._deltas.aclose()

    async def _run(self) -> AsyncIterator[ChoiceDelta]:
        """Every choice takes a step in turn, so chunks of different choices interleave."""
        count = 0
        request, engine = self._request, self._engine
        self._completion_tokens += (request.best_of - request.n) * len(request.prompts)  # the losers said one each
        choices = [
            self._choice(prompt, place * request.n + k, k)
            for place, prompt in enumerate(request.prompts)
            for k in range(request.n)
        ]
        while choices:
            for choice in list(choices):
                if engine.failure is not None and count == engine.fails_after:
                    raise engine.failure
                delta = next(choice, None)
                if delta is None:
                    choices.remove(choice)
                    continue
                self._completion_tokens += len(delta.token_ids)
                yield delta
                count += 1
                await (asyncio.sleep(3600) if engine.hangs else asyncio.sleep(0))

    def _choice(self, prompt: Prompt, index: int, k: int):  # type: ignore[no-untyped-def]
        params = self._request.params
        output = ChoiceOutput(self._request, prompt, index, tokenizer(), TokenTexts(tokenizer()))
        rows = None
        if params.prompt_logprobs is not None:
            rows = [logprobs_of(token, i, params.prompt_logprobs) for i, token in enumerate(prompt.token_ids[1:], 1)]
        if self._request.echo or rows is not None:
            echo = output.echo(rows) if self._request.echo else ChoiceDelta(index, "", [], None)
            finish = FinishReason.LENGTH if params.max_tokens == 0 else None
            yield ChoiceDelta(index, echo.text, [], echo.tokens, finish, prompt_logprobs=rows)
        tokens = self._engine.script(prompt, params)[: params.max_tokens]
        for start in range(0, len(tokens), self._engine.burst):
            delta = self._step(output, prompt, tokens, start)
            yield delta
            if delta.finish_reason is not None:
                return

    def _step(self, output: ChoiceOutput, prompt: Prompt, tokens: list[int], start: int) -> ChoiceDelta:
        params = self._request.params
        batch = tokens[start : start + self._engine.burst]
        rows = None
        if params.logprobs is not None:
            base = len(prompt.token_ids) + start
            rows = [logprobs_of(token, base + i, params.logprobs) for i, token in enumerate(batch)]
        stop_token = batch[-1] if batch[-1] in (EOS, *params.stop_token_ids) else None
        if stop_token is not None:
            return output.push(batch, rows, FinishReason.STOP, stop_token)
        last = start + len(batch) == len(tokens)
        return output.push(batch, rows, FinishReason.LENGTH if last else None)
