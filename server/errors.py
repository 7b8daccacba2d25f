# ruff: noqa: N818  (they are answers, and named as such: Unauthorized, Overloaded)
"""Every error the service knows, as one tree. It knows nothing of HTTP: api/errors.py has the one table to statuses.

Messages are written for the client who reads them: no path, address, traceback or prompt text. One stands apart:
SettingsError is for the operator, before there are clients.
"""

from __future__ import annotations


class SettingsError(Exception):
    """One clear line for the operator."""


class ServerError(Exception):
    """Anything the service says no with. `message` is shown to the client as it stands."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class RequestError(ServerError):
    """The client's mistake: the same request will fail again."""


class InvalidRequest(RequestError):
    """A field is wrong, or two do not go together."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)


class GrammarDeadEnd(InvalidRequest):
    """What was generated is no answer: it neither matches its grammar nor was it cut short."""

    def __init__(self) -> None:
        super().__init__(
            "The grammar or schema led to where nothing can follow although it is not matched, or where finding out "
            "what can follow takes too long.",
            code="grammar_dead_end",
        )


class ContextLengthExceeded(InvalidRequest):
    """Prompt and completion do not fit the model. Clients look for how the sentence starts, and for the code."""

    def __init__(self, max_model_len: int, prompt_tokens: int, max_tokens: int) -> None:
        hint = " (HINT: an operator can have 'max_tokens' cut to what is left, by --clamp-max-tokens.)"
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, however you requested "
            f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in your prompt; {max_tokens} for the completion). "
            f"Please reduce your prompt; or completion length.{hint if prompt_tokens < max_model_len else ''}",
            "prompt",
            "context_length_exceeded",
        )


class Unauthorized(RequestError):
    pass


class Forbidden(RequestError):
    """Nobody may, whatever the key."""


class NotFound(RequestError):
    pass


class ModelNotFound(NotFound):
    def __init__(self, name: str) -> None:
        shown = "".join(c if c.isprintable() else "?" for c in name[:100])
        super().__init__(
            f"The model `{shown}` does not exist or you do not have access to it.",
            param="model",
            code="model_not_found",
        )


class MethodNotAllowed(RequestError):
    pass


class BodyTimeout(RequestError):
    """The body did not arrive in time."""


class BodyTooLarge(RequestError):
    pass


class UnsupportedEncoding(RequestError):
    """The body is compressed, or in any other coding than as it is."""


class TryLater(ServerError):
    """Nothing is wrong with the request; it was refused before any work was done on it."""

    def __init__(self, message: str, *, retry_after: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after  # seconds; clients see an integer from 1 to 60


class RateLimited(TryLater):
    """This key has had its share."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after, code="rate_limit_exceeded")


class Overloaded(TryLater):
    """The queue is full, or no worker is ready yet."""


class Asleep(Overloaded):
    """An operator has put the workers to sleep."""

    def __init__(self) -> None:
        super().__init__("The server is asleep; an operator has to wake it up (POST /wake_up).")


class Loading(Overloaded):
    """No worker has its weights yet."""

    def __init__(self) -> None:
        super().__init__("The model is still loading. Please try again shortly.")


class StorageError(TryLater):
    """Files or the database cannot be read or written now."""

    def __init__(self) -> None:
        super().__init__("The server cannot reach or write its store. Please try again later.", code="storage_error")


class Draining(Overloaded):
    """The server is about to leave; the client had better take another connection."""


class EngineError(ServerError):
    """The engine failed this request."""

    def __init__(self, message: str = "The engine failed while working on this request.") -> None:
        super().__init__(message, code="engine_error")


class WorkerKilled(EngineError):
    """By this request, again and again; it had better not be sent once more."""


class DeadlineExceeded(ServerError):
    """The request's time was up before it was answered."""
