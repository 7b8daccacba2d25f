"""What takes long is done beside the event loop, in pieces, and is paid for although it is refused."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from asking import error_of, make_api
from scripted import tokenizer

from server.api.aside import INLINE_BYTES, parse_aside
from server.api.prompts import INLINE_SIZE, PIECE_SIZE, encode

TOKENIZER = tokenizer()


class Watched:
    """A tokenizer that says where it works."""

    def __init__(self) -> None:
        self.on_loop = self.beside = 0
        self.vocab_size, self.start_id = TOKENIZER.vocab_size, TOKENIZER.start_id

    def encode(self, text: str) -> list[int]:
        self._note(len(text))
        return TOKENIZER.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        self._note(len(ids))
        return TOKENIZER.decode(ids)

    def _note(self, size: int) -> None:
        if threading.current_thread() is threading.main_thread():
            self.on_loop += size
        else:
            self.beside += size


@pytest.mark.parametrize(("prompts", "inline"), [
    (["x" * INLINE_SIZE], True), (["x" * 40] * 100, True), ([[5] * 40] * 100, True),
    (["x" * 41] * 100, False), (["x" * 3990] * 128, False), ([[5] * 41] * 100, False), (["x" * 70_000, "", "y"], False),
])  # fmt: skip
def test_prompts_that_are_long_together_are_read_beside_the_event_loop(prompts: list[Any], inline: bool) -> None:
    watched = Watched()
    read = asyncio.run(encode(prompts, watched, None))  # type: ignore[arg-type]
    assert (watched.on_loop > 0) is inline
    assert (watched.beside > 0) is not inline
    expected = [TOKENIZER.encode(each) or [300] if isinstance(each, str) else each for each in prompts]
    assert [prompt.token_ids for prompt in read] == expected


def test_a_long_request_is_handed_over_in_pieces_so_that_another_gets_its_turn() -> None:
    first, second = Watched(), Watched()
    order: list[str] = []

    async def both() -> None:
        async def read(name: str, watched: Watched, prompts: list[str]) -> None:
            await encode(prompts, watched, None)  # type: ignore[arg-type]
            order.append(name)

        long = read("long", first, ["x" * 3990] * 400)
        more = [read("long", Watched(), ["x" * 3990] * 400) for _ in range(3)]
        await asyncio.gather(long, *more, read("short", second, ["x" * (PIECE_SIZE // 4)]))

    asyncio.run(both())
    assert order[0] == "short"


def test_a_long_body_is_parsed_beside_the_event_loop() -> None:
    def where(raw: bytes, expected: bool) -> bool:
        return (threading.current_thread() is threading.main_thread()) is expected

    assert asyncio.run(parse_aside(where, b"x" * INLINE_BYTES, True))
    assert asyncio.run(parse_aside(where, b"x" * (INLINE_BYTES + 1), False))


def test_a_prompt_that_is_too_long_is_charged_to_its_key() -> None:
    api = make_api(keys={"alice": "sk-alice"})
    api.client.headers["authorization"] = "Bearer sk-alice"
    error = error_of(api.post(prompt=["x" * 100] * 9), 400)
    assert error["code"] == "context_length_exceeded"
    assert api.engine.charged == {"alice": 900}
    error_of(api.post("/v1/embeddings", input="y" * 100), 400)
    assert api.engine.charged == {"alice": 1000}
    assert api.complete(prompt="x")["choices"][0]["text"] == "hello"
    assert api.engine.charged == {"alice": 1000}
