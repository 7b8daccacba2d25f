"""Long work on what one client sent, beside the event loop that serves everybody.

A thread does not make it shorter: what holds the interpreter's lock in one call holds up the loop for that long. So it
is handed over in pieces, and whoever has many pieces queues anew for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

INLINE_BYTES = 16_384  # of JSON: parsed and checked within a millisecond
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_texts = anyio.CapacityLimiter(2)  # between text and tokens
_bodies = anyio.CapacityLimiter(2)
_templates = anyio.CapacityLimiter(1)


async def parse_aside(parse: Callable[[bytes, *Ts], T], raw: bytes, *rest: *Ts) -> T:
    """What `parse` makes of a body; in a thread where that may take long. Raises what it raises."""
    if len(raw) <= INLINE_BYTES:
        return parse(raw, *rest)
    return await anyio.to_thread.run_sync(parse, raw, *rest, limiter=_bodies)


async def tokenize_aside(work: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """In a thread, after those that wait for one."""
    return await anyio.to_thread.run_sync(work, *arguments, limiter=_texts)


async def render_aside(work: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """A chat template's work: in one thread, since each that runs takes its share of the loop's time."""
    return await anyio.to_thread.run_sync(work, *arguments, limiter=_templates)
