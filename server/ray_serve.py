"""gpt2-server on Ray Serve: replicas of the whole, on as many machines as a cluster has. Needs the extra `[ray]`.

    serve run server.ray_serve:build model=openai-community/gpt2

or a config file (docker/ray-serve.yaml). `Completions` is the application and its worker, one engine a replica. `Front`
takes the HTTP request, reads its prompt, and sends it to the replica that was sent most of that prompt before; Ray's
proxy would choose before it has seen a body. A replica that dies costs no request of which nothing was sent yet: the
front asks another. What Ray's processes say to each other is Ray's affair (it pickles): keep its network to itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from server.api.errors import error_object, error_response
from server.api.sse import event
from server.assembly import POLL, Backend, assemble
from server.engine.router import CROWD, PrefixRecord, block_digests
from server.errors import BodyTooLarge, EngineError, Overloaded
from server.settings import Settings

log = logging.getLogger("ray.serve")

ATTEMPTS = 4  # replicas that are asked, one after another, before a request is given up
BLOCK_SIZE = 64  # bytes of a prompt's text, or its token ids, that count as one block
PREFIX_MAX = 256  # blocks looked at
RECORD_SIZE = 100_000  # blocks remembered of each replica
LOST = EngineError("The replica that was answering is gone.")


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way from the front to a replica."""

    scope: dict[str, Any]  # method, path, query and headers of the ASGI scope
    body: bytes
    digests: list[bytes]  # of its prompt's blocks


@dataclass(frozen=True, slots=True)
class Head:
    """The start of an answer; its body follows as bytes."""

    status: int
    headers: list[tuple[bytes, bytes]]


class PrefixAffinity(RequestRouter):
    """First the replica that holds most of the prompt, of those that are not crowded; then the others."""

    def initialize_state(self, **_: Any) -> None:
        self._records: dict[ReplicaID, PrefixRecord] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        digests = _asked(pending_request)
        if not candidate_replicas or digests is None:
            return [candidate_replicas]
        loads = {each.replica_id: self.replica_queue_len_cache.get(each.replica_id) or 0 for each in candidate_replicas}
        idlest = min(loads.values())
        able = [each for each in candidate_replicas if loads[each.replica_id] - idlest < CROWD]
        random.shuffle(able)  # equals take turns
        best = min(able, key=lambda each: (-self._held(each, digests), loads[each.replica_id]))
        return [[best], [each for each in candidate_replicas if each is not best]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        if (digests := _asked(pending_request)) is not None:
            self._records.setdefault(replica_id, PrefixRecord(RECORD_SIZE)).add(digests)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._records.pop(replica_id, None)

    def _held(self, replica: RunningReplica, digests: list[bytes]) -> int:
        record = self._records.get(replica.replica_id)
        return 0 if record is None else record.held(digests)


def _asked(request: PendingRequest | None) -> list[bytes] | None:
    """Digests of the call that waits for a replica; None where there is no call.

    By the attribute and not the class: Ray sends the router's module by value, so here `Call` is not the front's.
    """
    digests: list[bytes] | None = getattr(request.args[0], "digests", None) if request and request.args else None
    return digests


@serve.deployment(
    name="Completions",
    max_ongoing_requests=512,
    request_router_config=RequestRouterConfig(request_router_class=PrefixAffinity),
    graceful_shutdown_timeout_s=45,
    health_check_period_s=5,
)
class Completions:
    """One engine: the application without its socket, and the worker that computes for it."""

    _backend: Backend
    _workers: list[asyncio.Task[int]]

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        self._backend = assemble(Settings(**settings))
        self._workers = self._backend.start()
        while not self._backend.engine.ready:
            self.check_health()
            await asyncio.sleep(POLL)

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica for which this raises."""
        if any(worker.done() for worker in self._workers) or not self._backend.engine.healthy:
            raise RuntimeError("the engine has stopped")

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        """The head, then the body as it comes. Leaving it is what a client's hanging up is elsewhere."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        running = asyncio.create_task(self._run(call, messages))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield Head(message["status"], list(message["headers"]))
                elif body := message.get("body"):
                    yield body
        finally:
            running.cancel()

    async def _run(self, call: Call, messages: asyncio.Queue[Message | None]) -> None:
        bodies = [call.body]

        async def receive() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await asyncio.Event().wait()  # who hangs up cancels all this
            raise AssertionError

        try:
            await self._backend.app(_asgi(call.scope), receive, messages.put)
        finally:
            messages.put_nowait(None)

    async def __del__(self) -> None:
        """Ray awaits it when it lets a replica go, after its last request."""
        await self._backend.stop(self._workers)


@serve.deployment(name="Front", max_ongoing_requests=2048)
class Front:
    """Takes HTTP, and asks the replica that suits."""

    def __init__(self, completions: DeploymentHandle, max_body_bytes: int) -> None:
        self._ask = completions.options(stream=True).answer
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        body = await self._read(request)
        if body is None:
            return error_response(BodyTooLarge(f"The body is larger than {self._max_body_bytes} bytes."))
        call = Call(_scope(request), body, _digests(request, body))
        for _ in range(ATTEMPTS):
            answer = self._ask.remote(call)
            begun = False
            try:
                head = await anext(answer)
                first = await anext(answer, b"")
                begun = True
                return _response(head, self._body(first, answer))
            except RayActorError:
                log.warning("a replica was lost; asking another")
            finally:
                if not begun:
                    answer.cancel()
        return error_response(Overloaded("No replica could answer. Please try again shortly."))

    async def _read(self, request: Request) -> bytes | None:
        """None where there is too much of it."""
        body = b""
        try:
            async for part in request.stream():
                body += part
                if len(body) > self._max_body_bytes:
                    return None
        except ClientDisconnect:
            pass  # nobody will see the answer
        return body

    async def _body(self, first: bytes, answer: Any) -> AsyncIterator[bytes]:
        try:
            yield first
            async for part in answer:
                yield part
        except RayActorError:
            yield event(json.dumps(error_object(LOST)).encode())
        finally:
            answer.cancel()


def build(settings: dict[str, Any]) -> Application:
    """The application, for `serve run`: settings as in a --config file. Raises ValidationError."""
    completions = Completions.bind(settings)  # type: ignore[attr-defined]
    return Front.bind(completions, Settings(**settings).max_body_bytes)  # type: ignore[attr-defined]


def _response(head: Head, body: AsyncIterator[bytes]) -> Response:
    response = StreamingResponse(body, head.status)
    response.raw_headers = head.headers
    return response


def _scope(request: Request) -> dict[str, Any]:
    return {name: request.scope[name] for name in ("method", "path", "query_string", "headers")}


def _asgi(scope: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
        "raw_path": scope["path"].encode(), "root_path": "", "client": None, "server": None, **scope,
    }  # fmt: skip


def _digests(request: Request, body: bytes) -> list[bytes]:
    """Of a prompt's blocks, salted with the caller's key, as the replicas' own caches are; of several, the first."""
    try:
        prompt = json.loads(body)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    while isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    units = list(prompt.encode("utf-8", "replace")) if isinstance(prompt, str) else prompt
    if not isinstance(units, list) or not all(isinstance(unit, int) and 0 <= unit < 1 << 32 for unit in units):
        return []
    salt = request.headers.get("authorization", "").encode()
    return block_digests(units[: PREFIX_MAX * BLOCK_SIZE], salt, BLOCK_SIZE)
