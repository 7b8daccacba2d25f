"""Token ids to text, for one choice: whole UTF-8 characters, stop strings, logprob rows, text offsets.

Pure: no clock, no I/O. It knows nothing of JSON, of streams, or of how tokens were chosen. Joined, what it hands out is
what the tokenizer's decoder makes of all generated tokens (with byte-level BPE: `bytes.decode("utf-8", "replace")` of
their bytes), cut where a stop string says so; how they arrived, one by one or many at once, leaves no trace in it.
"""

from __future__ import annotations

from model.step import TokenLogprobs
from model.tokenizer import Tokenizer
from server.engine.request import ChoiceDelta, GenerationRequest, Prompt, TokenInfo
from server.engine.stops import StopMatch, StopMatcher
from server.worker.messages import FinishReason

LOGPROB_FLOOR = -9999.0  # stands for minus infinity, which JSON cannot say


class TokenTexts(dict[int, str]):
    """How the logprobs object shows each token. Distinct tokens have distinct names; filled as they are met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        text = self[token] = self._tokenizer.name(token)
        return text


class ChoiceOutput:
    """One choice's text in the making. Call `echo` first, if the request asks for it, then `push` until a reason."""

    def __init__(self, request: GenerationRequest, prompt: Prompt, index: int, tokenizer: Tokenizer, texts: TokenTexts):
        """`texts` is shared by every choice of the server."""
        self.index = index
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._texts = texts
        self._top_count = request.params.logprobs
        self._named = bool(request.params.logprob_token_ids)  # the tokens that are shown beside each of the output
        self._min_tokens = request.params.min_tokens
        self._show_stop_token = request.include_stop_str_in_output
        self._skip_special = request.skip_special_tokens
        self._tokens_as_ids = request.tokens_as_ids
        self._decoder = tokenizer.decoder(prompt.token_ids)
        self._stops = StopMatcher(request.stop, keep=request.include_stop_str_in_output)
        self._characters = len(prompt.text)  # completed, from the start of the prompt
        self._count = 0

    def echo(self, rows: list[TokenLogprobs] | None) -> ChoiceDelta:
        """The prompt as the first delta. rows: scores of prompt[1:], where logprobs are asked for."""
        if self._top_count is None:
            return ChoiceDelta(self.index, self._prompt.text, [], None)
        assert rows is not None
        assert len(rows) == len(self._prompt.token_ids) - 1
        decoder, offset, infos = self._tokenizer.decoder(()), 0, []
        for token, row in zip(self._prompt.token_ids, [None, *rows], strict=True):
            infos.append(self._row(token, row, min(offset, len(self._prompt.text)), self._top_count))
            if not self._was_put_around(token, offset):
                offset += len(decoder.push(token))
        return ChoiceDelta(self.index, self._prompt.text, [], infos)

    def _was_put_around(self, token: int, offset: int) -> bool:
        """Whether the tokenizer has added a special token to the prompt's text, which has nothing of it."""
        if token not in self._tokenizer.special_ids:
            return False
        return not self._prompt.text[offset:].lstrip().startswith(self._tokenizer.name(token))

    def push(
        self,
        tokens: list[int],
        logprobs: list[TokenLogprobs] | None = None,
        finish: FinishReason | None = None,
        stop_token: int | None = None,
    ) -> ChoiceDelta:
        """Take what a step added. A stop string may end the choice before `finish` does: look at the delta's reason.

        stop_token: the last of `tokens`, when that is what ended the sequence.
        """
        text, infos = "", []
        for place, token in enumerate(tokens):
            ends = stop_token is not None and place == len(tokens) - 1
            if self._top_count is not None:
                assert logprobs is not None
                count = len(logprobs[place].top) if self._named else self._top_count
                infos.append(self._row(token, logprobs[place], self._characters, count))
            match = self._take(None if self._is_silent(token, ends) else token)
            text += match.text
            if match.stop is not None:
                return self._delta(text, tokens[: place + 1], infos, FinishReason.STOP, match.stop)
        if finish is None:
            return self._delta(text, tokens, infos, None, None)
        match = self._stops.push(self._grow(self._decoder.flush()), immune=self._count <= self._min_tokens)
        text += match.text
        if match.stop is not None:
            return self._delta(text, tokens, infos, FinishReason.STOP, match.stop)
        reason = None if stop_token in self._tokenizer.eos_token_ids else stop_token
        return self._delta(text + self._stops.flush(), tokens, infos, finish, reason)

    def _take(self, token: int | None) -> StopMatch:
        """token: None for one that says nothing."""
        self._count += 1
        new = "" if token is None else self._grow(self._decoder.push(token))
        return self._stops.push(new, immune=self._count <= self._min_tokens)

    def _grow(self, text: str) -> str:
        self._characters += len(text)
        return text

    def _is_silent(self, token: int, ends: bool) -> bool:
        if ends and not self._show_stop_token:
            return True
        return self._skip_special and token in self._tokenizer.special_ids

    def _row(self, token: int, row: TokenLogprobs | None, offset: int, count: int) -> TokenInfo:
        name = self._name(token)
        if row is None:
            return TokenInfo(name, token, None, None, offset)
        value = max(row.logprob, LOGPROB_FLOOR)
        top: dict[str, float] | None = None
        if count:
            top = {self._name(id_): max(logprob, LOGPROB_FLOOR) for id_, logprob in row.top[:count]}
            top[name] = value  # added when it is not among the top, and the very same float when it is
        return TokenInfo(name, token, value, top, offset)

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._tokens_as_ids else self._texts[token]

    def _delta(
        self,
        text: str,
        tokens: list[int],
        infos: list[TokenInfo],
        finish: FinishReason | None,
        reason: str | int | None,
    ) -> ChoiceDelta:
        return ChoiceDelta(self.index, text, tokens, None if self._top_count is None else infos, finish, reason)
