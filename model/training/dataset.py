"""Training examples from JSONL: `{"prompt", "completion"}`, `{"text"}`, or `{"messages"}` where there is a template.

The loss is taken on what the model should learn to say: a completion, a whole text, or what the assistant says. Reading
is all or nothing: every bad line is named by its number, and a file with one gives no examples. Knows nothing of
networks or batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.chat_template import ChatTemplate
from model.errors import DataError, Problem, TemplateRefused
from model.tokenizer import Tokenizer

Piece = tuple[str, bool]  # text, and whether it is learnt

FORMATS = ({"prompt", "completion"}, {"text"}, {"messages"})
LINE_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class Example:
    tokens: npt.NDArray[np.int32]  # (length,), two at least
    learnt: npt.NDArray[np.bool_]  # (length,) the loss is taken where this token is predicted; never the first

    @property
    def targets(self) -> int:
        return int(self.learnt.sum())


class _BadLineError(Exception):
    """What is wrong with it."""


def read_examples(
    path: Path, tokenizer: Tokenizer, context: int, template: ChatTemplate | None = None
) -> list[Example]:
    """Examples that fit a context; a longer `text` becomes several. Raises DataError."""
    examples: list[Example] = []
    problems: list[Problem] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                try:
                    if line.strip():
                        examples += _examples(line, tokenizer, context, template)
                except (_BadLineError, TemplateRefused) as error:
                    problems.append(Problem(number, str(error)))
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror}") from None
    if problems:
        raise DataError(_summary(path.name, problems), tuple(problems))
    if not examples:
        raise DataError(f"{path.name} holds no examples")
    return examples


def _lines(file: Any) -> Iterator[bytes]:
    while line := file.readline(LINE_BYTES_MAX + 1):
        yield line
        while len(line) > LINE_BYTES_MAX and not line.endswith(b"\n"):  # the rest of a line that is too long
            line = file.readline(LINE_BYTES_MAX + 1)


def _summary(name: str, problems: list[Problem]) -> str:
    first, rest = problems[0], len(problems) - 1
    more = "" if not rest else f" (and {rest} more bad line{'s' * (rest > 1)})"
    return f"{name}, line {first.line}: {first.message}{more}"


def _examples(line: bytes, tokenizer: Tokenizer, context: int, template: ChatTemplate | None) -> list[Example]:
    value = _parse(line)
    if "text" in value:
        return _windows(_tokens([(_text(value, "text"), True)], tokenizer), context)
    if "messages" in value:
        pieces = _chat(value["messages"], template)
    else:
        completion = _text(value, "completion")
        if not completion:
            raise _BadLineError("'completion' is empty")
        pieces = [(_text(value, "prompt"), False), (completion, True)]
    example = _tokens(pieces, tokenizer)
    if len(example.tokens) > context + 1:  # the last token is predicted, never read
        raise _BadLineError(f"it has {len(example.tokens):,} tokens; the model's context is {context:,}")
    return [example]


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > LINE_BYTES_MAX:
        raise _BadLineError(f"it is longer than {LINE_BYTES_MAX >> 20} MiB")
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _BadLineError("it is not UTF-8") from None
    except (ValueError, RecursionError):
        raise _BadLineError("it is not JSON") from None
    if not isinstance(value, dict):
        raise _BadLineError("it is not a JSON object")
    if set(value) not in FORMATS:
        unknown = sorted(set(value) - set().union(*FORMATS))
        named = f"unknown key {unknown[0][:40]!r}; " if unknown else ""
        raise _BadLineError(named + "it must have 'prompt' and 'completion', or 'text', or 'messages'")
    return value


def _text(value: dict[str, Any], key: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise _BadLineError(f"'{key}' is not a string")
    return text


def _chat(messages: Any, template: ChatTemplate | None) -> list[Piece]:
    """The rendered dialogue in pieces: what the assistant says, up to where the template ends its turn, is learnt."""
    if template is None:
        raise _BadLineError("'messages' need a chat template, and the model has none")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise _BadLineError("'messages' is not a list of objects with 'role' and 'content', both strings")
    pieces: list[Piece] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight", 1) == 0:
            continue
        before = template.render(messages[:i], add_generation_prompt=True)
        after = template.render(messages[: i + 1], add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise _BadLineError("the chat template does not render a dialogue from its start to its end")
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    if not any(text for text, learnt in pieces if learnt):
        raise _BadLineError("no message of the assistant is there to learn from")
    return pieces


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) <= {"role", "content", "weight", "name"}
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        and message.get("weight", 1) in (0, 1)
    )


def _tokens(pieces: list[Piece], tokenizer: Tokenizer) -> Example:
    """Each piece tokenised by itself, as serving does; an empty beginning is `<|endoftext|>`, and so is the end."""
    tokens: list[int] = []
    learnt: list[bool] = []
    for text, learn in pieces:
        try:
            text.encode()  # tiktoken would put U+FFFD for what is no text
        except UnicodeEncodeError:
            raise _BadLineError("it holds half of a surrogate pair, which is no text") from None
        ids = tokenizer.encode(text)
        if not tokens and (learn or not ids):
            tokens, learnt = [tokenizer.eos_token_id], [False]
        tokens += ids
        learnt += [learn] * len(ids)
    if tokens[-1] not in tokenizer.eos_token_ids or len(tokens) == 1:
        tokens.append(tokenizer.eos_token_id)
        learnt.append(True)
    return Example(np.array(tokens, dtype=np.int32), np.array(learnt, dtype=np.bool_))


def _windows(example: Example, context: int) -> list[Example]:
    """Pieces of a context, each token learnt once: a window begins with the last token of the one before."""
    windows = []
    for start in range(0, len(example.tokens) - 1, context):
        cut = slice(start, start + context + 1)
        learnt = example.learnt[cut].copy()
        learnt[0] = False
        windows.append(Example(example.tokens[cut], learnt))
    return windows
