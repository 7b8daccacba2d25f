"""The web application, put together from its parts. It starts nothing: no engine, no socket, no task."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException

from model.tokenizer import Tokenizer
from server.api.auth import METHODS, OPEN_PATHS, AuthMiddleware, OriginMiddleware, PreflightMiddleware
from server.api.chat import chat_routes
from server.api.chat_template import ChatTemplate
from server.api.completions import CompletionService, completion_routes
from server.api.embeddings import embedding_routes
from server.api.engines import engine_routes
from server.api.errors import answer_http_exception, answer_server_error
from server.api.keys import Keyring
from server.api.limits import Limits
from server.api.middleware import AnswerHook, AnswerMiddleware
from server.api.models import ServedModel, model_routes
from server.api.ops import ops_routes
from server.api.phrases import Phrases
from server.api.playground import FILES as PLAYGROUND_FILES
from server.api.playground import playground_routes
from server.api.removal import absent_routes
from server.api.schemas import ErrorAnswer
from server.api.sleep import Sleeper, sleep_routes
from server.api.tokenize import tokenize_routes
from server.engine.grammars import GrammarChecker
from server.engine.output import TokenTexts
from server.engine.request import GenerationEngine
from server.errors import ServerError

EXPOSED_HEADERS = (
    "x-request-id", "openai-processing-ms", "openai-model", "openai-version", "retry-after", "x-ignored-fields",
)  # fmt: skip
FAILURES: dict[int | str, str] = {
    400: "The request is wrong",
    401: "No key, or a wrong one",
    403: "A web page of an origin that is not let in",
    404: "No such model or URL",
    405: "No such method here",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is compressed",
    429: "This key has had its share; see Retry-After",
    500: "The server failed",
    503: "The queue is full, or the server is starting or leaving; see Retry-After",
    504: "The request took longer than a request may take",
    "default": "Any other failure",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in FAILURES.items()
}


def create_app(
    *,
    engine: GenerationEngine,
    tokenizer: Tokenizer,
    model: ServedModel,
    limits: Limits,
    version: str,
    registry: CollectorRegistry,
    on_answer: AnswerHook,
    grammars: GrammarChecker | None = None,
    chat_template: ChatTemplate | None = None,
    sleeper: Sleeper | None = None,
    stored: APIRouter | None = None,
    keys: Keyring | None = None,
    open_paths: Set[str] = frozenset(),
    max_headers: int = 100,
    cors_origins: Sequence[str] = (),
    playground: bool = False,
) -> FastAPI:
    """stored: the routes of what a data directory keeps. keys: None leaves the server open to all. open_paths: what
    needs no key beside what never does."""
    app = FastAPI(
        title="gpt2-server",
        version=version,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to where a Host header says
        responses=ERRORS,
    )
    texts, running = TokenTexts(tokenizer), set[str]()
    service = CompletionService(
        engine=engine,
        tokenizer=tokenizer,
        model=model,
        limits=limits,
        texts=texts,
        running=running,
        phrases=Phrases(tokenizer),
        grammars=grammars,
    )
    app.include_router(chat_routes(service, chat_template))  # before completions, whose engines may have any name
    app.include_router(completion_routes(service))
    app.include_router(embedding_routes(service))
    app.include_router(model_routes(model))
    app.include_router(engine_routes(model, engine))
    app.include_router(tokenize_routes(model, tokenizer, texts, limits))
    app.include_router(ops_routes(engine, registry, running, version))
    app.include_router(absent_routes(model) if stored is None else stored)
    if sleeper is not None:
        app.include_router(sleep_routes(sleeper))
    app.add_exception_handler(ServerError, answer_server_error)
    app.add_exception_handler(HTTPException, answer_http_exception)
    open_paths = OPEN_PATHS | open_paths
    if playground:
        app.include_router(playground_routes())
        open_paths |= PLAYGROUND_FILES.keys()
    if keys is not None:  # what is added last stands outermost
        app.add_middleware(AuthMiddleware, keys=keys, open_paths=open_paths)
    app.add_middleware(OriginMiddleware, allowed=frozenset(cors_origins))
    if cors_origins:
        app.add_middleware(
            PreflightMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=METHODS,
            allow_private_network=True,  # a page that is let in may ask a server of this machine or network
            allow_headers=["*"],
            expose_headers=list(EXPOSED_HEADERS),
        )
    app.add_middleware(AnswerMiddleware, on_answer=on_answer, max_headers=max_headers)
    return app
