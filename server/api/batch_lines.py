"""The lines of a batch, answered by the very code that answers POST /v1/completions."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from typing import Any

from server.api.completions import CompletionService
from server.api.errors import INTERNAL, error_object, status_of
from server.api.keys import Caller
from server.api.parsing import CompletionRequest, parse_fields
from server.api.prompts import DEFAULT_MAX_TOKENS
from server.errors import EngineError, InvalidRequest, Overloaded, ServerError, TryLater
from server.jobs.batch_runner import LineAnswer

log = logging.getLogger(__name__)


class CompletionLines:
    def __init__(self, service: CompletionService) -> None:
        self._service = service
        self.max_body_bytes = service.limits.max_body_bytes

    def check(self, body: Mapping[str, Any]) -> str:
        """Returns the name of the model that will answer. Raises RequestError."""
        return self._service.model.resolve(self._parse(body).body.model)

    async def answer(self, body: Mapping[str, Any], owner: str) -> LineAnswer:
        """Whatever comes of it. Raises TryLater where it has to be asked again."""
        request_id = f"req_{secrets.token_hex(16)}"
        try:
            return await self._complete(self._parse(body), owner, request_id)
        except TryLater:
            raise
        except EngineError as error:
            if not self._service.engine.healthy:  # it was not this line's fault, and the next engine will answer it
                raise Overloaded("The engine has stopped.") from None
            return _refusal(error, request_id)
        except ServerError as error:
            return _refusal(error, request_id)
        except Exception:
            log.exception("request %s of a batch failed", request_id)
            return _refusal(INTERNAL, request_id)

    def _parse(self, body: Mapping[str, Any]) -> CompletionRequest:
        asked = parse_fields(body, self._service.limits, DEFAULT_MAX_TOKENS)
        if asked.body.stream:
            raise InvalidRequest("'stream' is not supported in a batch.", "stream", "unsupported_parameter")
        return asked

    async def _complete(self, asked: CompletionRequest, owner: str, request_id: str) -> LineAnswer:
        service = self._service
        shape, name = service.shape(asked), service.model.resolve(asked.body.model)
        answer = await service.begin(asked, shape, "cmpl-", Caller(owner), name, background=True)
        try:
            body = await answer.collect()
        finally:
            await answer.close()
        used = answer.generation.usage
        return LineAnswer(
            status=200,
            request_id=request_id,
            body=body,
            input_tokens=used.prompt_tokens,
            cached_tokens=used.cached_tokens,
            output_tokens=used.completion_tokens,
        )


def _refusal(error: ServerError, request_id: str) -> LineAnswer:
    body = json.dumps(error_object(error), ensure_ascii=False).encode()
    return LineAnswer(status=status_of(error)[0], request_id=request_id, body=body)
