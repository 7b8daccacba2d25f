"""Requests as nobody should send them: right ones, nearly right ones and garbage, by the hundred thousand.

Seeded, and without hypothesis: a hundred thousand are to be made in a minute. Bodies are cheap to answer, as most are
refused and the others want few tokens.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

WEIRD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 17, 127, 128, 129, 50256, 50257, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**70,
    10**400, 0.5, 1.0, -0.0, 1e-320, 1e308, -1e308, "", "a", "7", "true", "\x00", "\u2028", "é", "👩🏽‍🚀",
    "<|endoftext|>", "a" * 300, "../../etc/passwd", "gpt2", [], [[]], [None], [1], ["a"], [["a"]], [[1], ["a"]],
    [1, "a"], [1.5], [-1], [50257], [[50257]], ["a"] * 200, {}, {"a": 1}, {"1": 1}, {"1": 101}, {"-1": 1}, {"99999": 1},
    {"1": "1"}, {"type": "json_object"}, {"type": "x"}, {"include_usage": True}, {"regex": "("},
    [{"role": "user", "content": "a"}], [{"role": [], "content": {}}], [{"role": "tool"}], [{}],
]  # fmt: skip
SMALL: dict[str, list[Any]] = {
    "max_tokens": [0, 1, 2, 3], "n": [1, 2], "best_of": [1, 2], "temperature": [0, 0.7, 2], "top_p": [0, 0.5, 1],
    "echo": [True, False], "logprobs": [0, 1, 5], "stop": ["a", ["a", "b"], "\n"], "stream": [True, False],
    "seed": [0, 7, -1], "logit_bias": [{"5": 1}, {"50256": -100}], "presence_penalty": [0.5, -2],
    "frequency_penalty": [0.5, -2], "user": ["u"], "top_k": [-1, 0, 3], "min_p": [0, 0.1], "repetition_penalty": [1.2],
    "ignore_eos": [True], "stop_token_ids": [[5], []], "bad_words": [["a"]], "return_token_ids": [True],
    "min_tokens": [0, 1], "prompt_logprobs": [0, 2], "truncate_prompt_tokens": [1, -1], "priority": [0, -3],
    "allowed_token_ids": [[5, 6, 7]], "use_beam_search": [True], "length_penalty": [1.0, 0.5], "typical_p": [0.9],
    "dry_multiplier": [0.8], "xtc_probability": [0.5], "cache_salt": ["x"], "request_id": ["r-1"],
    "stream_options": [{"include_usage": True}], "guided_regex": ["[ab]+"], "guided_choice": [["a", "b"]],
    "response_format": [{"type": "text"}, {"type": "json_object"}], "guided_json": [{"type": "integer"}],
    "suffix": ["x"], "early_stopping": [True, "never"], "model": ["gpt2-server", "none"], "odd": [1],
}  # fmt: skip
PROMPTS = ["", "a", "The sea", ["a", "b"], [5, 6, 7], [[5], [6, 7]], "日本語", None, "x " * 400]
PATHS = [
    "/v1/completions", "/v1/completions", "/v1/completions", "/v1/completions", "/completions", "/v1/embeddings",
    "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/engines/davinci/completions",
    "/v1/engines/none/embeddings",
]  # fmt: skip
OTHER = [
    "/", "/health", "/ready", "/ping", "/version", "/load", "/metrics", "/openapi.json", "/v1/models",
    "/v1/models/none",
    "/v1/models/davinci", "/v1/engines", "/v1/engines/none", "/tokenizer_info", "/v1/files", "/v1/fine_tuning/jobs",
    "/nowhere", "/v1/completions/", "//", "/%00", "/%ff%fe", "/..%2f..%2fetc/passwd", "/v1/models/" + "x" * 3000,
    "/v1/models/%0d%0aSet-Cookie:a", "/v1/completions?a=%zz", "/docs", "/favicon.ico", "/playground.js",
]  # fmt: skip
METHODS = ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "POST", "get", "PROPFIND"]
HEADERS = [
    "X-Request-Id: {junk}", "Authorization: Bearer {junk}", "Content-Type: {junk}", "Accept: {junk}", "Origin: {junk}",
    "Content-Encoding: gzip", "Expect: 100-continue", "Range: bytes=0-1,{junk}", "Accept-Encoding: {junk}",
    "X-Forwarded-For: {junk}", "Host: {junk}", "Cookie: {junk}", "X-API-Key: {junk}", "Upgrade: websocket", "{junk}: a",
]  # fmt: skip
JUNK = [
    "",
    "a",
    "x/y",
    "*",
    "127.0.0.1",
    "a" * 200,
    "\x7f",
    "é",
    "%",
    "a b",
    "1,2,3",
    "gzip",
    '"',
    "multipart/form-data",
]


@dataclass(frozen=True, slots=True)
class Hostile:
    raw: bytes  # the whole request
    whole: bool  # it is HTTP, and ends where it says: an answer is due, on a connection that stays


def hostile(dice: random.Random) -> Hostile:
    kind = dice.random()
    if kind < 0.30:
        return posted(dice, _body(dice, wrong=0))
    if kind < 0.70:
        return posted(dice, _body(dice, wrong=dice.choice([1, 1, 1, 2, 5])))
    if kind < 0.82:
        return posted(dice, mutated(dice, _body(dice, wrong=0)))
    if kind < 0.94:
        return _other(dice)
    return Hostile(mutated(dice, posted(dice, _body(dice, wrong=0)).raw), whole=False)


def fields(dice: random.Random, wrong: int) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": dice.choice(PROMPTS), "max_tokens": dice.choice([0, 1, 1, 2])}
    for name in dice.sample(sorted(SMALL), dice.choice([0, 0, 1, 2, 4])):
        asked[name] = dice.choice(SMALL[name])
    if dice.random() < 0.3:
        asked |= {"input": asked["prompt"], "tokens": [5, 6], "messages": [{"role": "user", "content": "a"}]}
    for _ in range(wrong):
        name = dice.choice([*SMALL, "prompt", "input", "tokens", "messages", "tools", "response_format", "", "\u2028"])
        asked[name] = _weird(dice)
    return asked


def _weird(dice: random.Random) -> Any:
    value = dice.choice(WEIRD)
    for _ in range(dice.choice([0, 0, 0, 1, 2, 40])):
        value = [value] if dice.random() < 0.5 else {"a": value}
    return value


def _body(dice: random.Random, wrong: int) -> bytes:
    if wrong == 1 and dice.random() < 0.1:
        return json.dumps(_weird(dice)).encode()
    return json.dumps(fields(dice, wrong), ensure_ascii=dice.random() < 0.5).encode("utf-8")


def posted(dice: random.Random, body: bytes) -> Hostile:
    head = f"POST {dice.choice(PATHS)} HTTP/1.1\r\nHost: x\r\n"
    if dice.random() < 0.2:
        size = dice.choice([1, 6, 100, 5000])
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        return Hostile(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n", whole=True)
    return Hostile(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, whole=True)


def _other(dice: random.Random) -> Hostile:
    """Any method on any path, with headers that mean nothing, or too much."""
    headers = [dice.choice(HEADERS).replace("{junk}", dice.choice(JUNK)) for _ in range(dice.choice([0, 1, 3, 120]))]
    body = b"" if dice.random() < 0.7 else _body(dice, wrong=1)
    lines = [f"{dice.choice(METHODS)} {dice.choice(OTHER + PATHS)} HTTP/1.1", "Host: x", *headers]
    return Hostile("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body, whole=not headers)


def mutated(dice: random.Random, data: bytes) -> bytes:
    """A few bytes of it changed, dropped, doubled or put elsewhere."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 4, 16])):
        at, length = dice.randrange(len(changed) + 1), dice.choice([1, 1, 2, 8, 64])
        match dice.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                changed[at:at] = dice.choice(TOKENS)
            case 4:
                changed[at:at] = dice.randbytes(length)
            case 5:
                del changed[at:]
    return bytes(changed)


TOKENS = [
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"NaN", b"-Infinity", b"1e999", b"\\ud800", b"\\u0000", b"\xff",
    b"\xef\xbb\xbf", b"9" * 500, b"[" * 300, b"\r\n", b"\n", b"\x00", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n",
    b"Content-Length: 5\r\n", b" ", b"\t", b"true", b"-", b"e", b"/*", b'"a":1,',
]  # fmt: skip
