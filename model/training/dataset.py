"""Training examples from JSONL: `{"prompt", "completion"}`, `{"text"}`, or `{"messages"}` where there is a template;
and pairs of answers of which one is preferred.

The loss is taken on what the model should learn to say: a completion, a whole text, or what the assistant says. Reading
is all or nothing: every bad line is named by its number, and a file with one gives no examples. What is cut, left out
or there twice is counted. Knows nothing of networks or batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from model.chat_template import ChatTemplate
from model.errors import DataError, Problem, TemplateRefused
from model.tokenizer import Tokenizer

T = TypeVar("T")
Piece = tuple[str, bool]  # text, and whether it is learnt

FORMATS = ({"prompt", "completion"}, {"text"}, {"messages"})
PREFERENCE_FORMATS = ({"input", "preferred_output", "non_preferred_output"}, {"prompt", "chosen", "rejected"})
WANTED = "it must have 'prompt' and 'completion', or 'text', or 'messages'"
PREFERENCES_WANTED = (
    "it must have 'input', 'preferred_output' and 'non_preferred_output', or 'prompt', 'chosen' and 'rejected'"
)
LINE_BYTES_MAX = 16 << 20
KEYS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Example:
    tokens: npt.NDArray[np.int32]  # (length,), two at least
    learnt: npt.NDArray[np.bool_]  # (length,) the loss is taken where this token is predicted; never the first

    @property
    def targets(self) -> int:
        return int(self.learnt.sum())

    @property
    def parts(self) -> tuple[Example, ...]:
        return (self,)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example

    @property
    def targets(self) -> int:
        return self.chosen.targets + self.rejected.targets

    @property
    def parts(self) -> tuple[Example, ...]:
        return (self.chosen, self.rejected)


class TooLong(Enum):
    """What becomes of an example that is longer than the context."""

    TRUNCATE = "truncate"  # its end is left out
    SPLIT = "split"  # it becomes several, as a text does
    REFUSE = "refuse"  # its line is bad


@dataclass(slots=True)
class Counts:
    """What a reader of the file should know."""

    longer: int = 0  # examples longer than the context
    empty: int = 0  # of which nothing that is learnt was left within it
    unused: dict[str, int] = field(default_factory=dict)  # keys that say nothing here, and in how many lines

    def notes(self, name: str, context: int, too_long: TooLong) -> list[str]:
        """A sentence for each that is not zero."""
        done = "cut off at it" if too_long is TooLong.TRUNCATE else "split"
        keys = ", ".join(f"{key[:40]!r} ({count:,})" for key, count in list(self.unused.items())[:KEYS_SHOWN])
        more = ", …" * (len(self.unused) > KEYS_SHOWN)
        said = [
            (self.longer, f"examples longer than the context of {context:,} tokens, {done}: {self.longer:,}"),
            (self.empty, f"examples left out, of which nothing to learn is within the context: {self.empty:,}"),
            (len(self.unused), f"keys that are not used, and in how many lines: {keys}{more}"),
        ]
        return [f"{name}: {text}" for count, text in said if count]


@dataclass(frozen=True, slots=True)
class Reader:
    """How lines become examples."""

    tokenizer: Tokenizer
    context: int
    template: ChatTemplate | None = None
    too_long: TooLong = TooLong.TRUNCATE
    counts: Counts = field(default_factory=Counts)


class _BadLineError(Exception):
    """What is wrong with it."""


def read_examples(path: Path, reader: Reader) -> list[Example]:
    """Raises DataError."""
    return _read(path, reader, _examples)


def read_preferences(path: Path, reader: Reader) -> list[Preference]:
    """Raises DataError."""
    return _read(path, reader, _preferences)


def _read(path: Path, reader: Reader, read_line: Callable[[bytes, Reader], list[T]]) -> list[T]:
    examples: list[T] = []
    problems: list[Problem] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                try:
                    if line.strip():
                        examples += read_line(line, reader)
                except (_BadLineError, TemplateRefused) as error:
                    problems.append(Problem(number, str(error)))
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror}") from None
    if problems:
        raise DataError(_summary(path.name, problems), tuple(problems))
    if not examples:
        raise DataError(f"{path.name} holds no examples")
    return examples


def repeated(examples: Sequence[Example | Preference], seen: set[bytes]) -> int:
    """How many of them are in `seen`, to which they are added."""
    twice = 0
    for example in examples:
        digest = hashlib.blake2b(digest_size=16)
        for part in example.parts:
            digest.update(part.tokens.tobytes() + b"|" + part.learnt.tobytes())
        twice += digest.digest() in seen
        seen.add(digest.digest())
    return twice


def _lines(file: Any) -> Iterator[bytes]:
    while line := file.readline(LINE_BYTES_MAX + 1):
        yield line
        while len(line) > LINE_BYTES_MAX and not line.endswith(b"\n"):  # the rest of a line that is too long
            line = file.readline(LINE_BYTES_MAX + 1)


def _summary(name: str, problems: list[Problem]) -> str:
    first, rest = problems[0], len(problems) - 1
    more = "" if not rest else f" (and {rest} more bad line{'s' * (rest > 1)})"
    return f"{name}, line {first.line}: {first.message}{more}"


def _examples(line: bytes, reader: Reader) -> list[Example]:
    value = _parse(line, reader, FORMATS, WANTED)
    tokenizer = reader.tokenizer
    if "text" in value:
        return _windows(_tokens([(_text(value, "text"), True)], tokenizer), reader.context)
    if "messages" in value:
        pieces = _chat(value["messages"], reader.template)
    else:
        completion = _text(value, "completion")
        if not completion:
            raise _BadLineError("'completion' is empty")
        pieces = [(_text(value, "prompt"), False), (completion, True)]
    return _fit(_tokens(pieces, tokenizer, by_template="messages" in value), reader)


def _preferences(line: bytes, reader: Reader) -> list[Preference]:
    """OpenAI's lines, of which prompts and answers are messages, or TRL's, of which they are texts."""
    value = _parse(line, reader, PREFERENCE_FORMATS, PREFERENCES_WANTED)
    if "chosen" in value:
        prompt = _text(value, "prompt")
        answers = [[(prompt, False), (_text(value, name), True)] for name in ("chosen", "rejected")]
    else:
        asked = value["input"].get("messages") if isinstance(value["input"], dict) else None
        if not isinstance(asked, list):
            raise _BadLineError("'input' is not an object with 'messages'")
        muted = [{**each, "weight": 0} if isinstance(each, dict) else each for each in asked]
        answers = [_answer(muted, name, value, reader) for name in ("preferred_output", "non_preferred_output")]
    if not all(any(text for text, learnt in pieces if learnt) for pieces in answers):
        raise _BadLineError("an answer is empty")
    by_template = "chosen" not in value
    chosen, rejected = (_tokens(pieces, reader.tokenizer, by_template=by_template) for pieces in answers)
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise _BadLineError("the two answers are the same")
    fitting = [_fit(each, reader, split=False) for each in (chosen, rejected)]
    return [Preference(fitting[0][0], fitting[1][0])] if all(fitting) else []


def _answer(asked: list[Any], name: str, value: dict[str, Any], reader: Reader) -> list[Piece]:
    said = value[name]
    if not isinstance(said, list) or len(said) != 1 or not isinstance(said[0], dict):
        raise _BadLineError(f"'{name}' is not a list of one message")
    if said[0].get("role") != "assistant":
        raise _BadLineError(f"'{name}' is no message of the assistant")
    return _chat([*asked, said[0]], reader.template)


def text_windows(text: str, tokenizer: Tokenizer, context: int) -> list[Example]:
    """A whole document. Raises DataError."""
    try:
        return _windows(_tokens([(text, True)], tokenizer), context)
    except _BadLineError as error:
        raise DataError(str(error)) from None


def _fit(example: Example, reader: Reader, *, split: bool = True) -> list[Example]:
    """What of it is within the context; none where nothing of that is learnt. Raises _BadLineError."""
    context = reader.context
    if len(example.tokens) <= context + 1:  # the last token is predicted, never read
        return [example]
    if reader.too_long is TooLong.REFUSE:
        raise _BadLineError(f"it has {len(example.tokens):,} tokens; the model's context is {context:,}")
    reader.counts.longer += 1
    windows = _windows(example, context)
    kept = [each for each in windows if each.targets] if split and reader.too_long is TooLong.SPLIT else windows[:1]
    if not any(each.targets for each in kept):
        reader.counts.empty += 1
        return []
    return kept


def _parse(line: bytes, reader: Reader, formats: tuple[set[str], ...], wanted: str) -> dict[str, Any]:
    """The keys of one format; others are counted."""
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
    meant = [keys for keys in formats if keys <= value.keys()]
    unused = sorted(value.keys() - set().union(*formats))
    if len(meant) != 1:
        named = f"unknown key {unused[0][:40]!r}; " if unused and not meant else ""
        raise _BadLineError(named + wanted)
    for key in sorted(value.keys() - meant[0]):
        reader.counts.unused[key] = reader.counts.unused.get(key, 0) + 1
    return {key: value[key] for key in meant[0]}


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


def _tokens(pieces: list[Piece], tokenizer: Tokenizer, *, by_template: bool = False) -> Example:
    """Each piece tokenised by itself, as serving does; an empty beginning is `<|endoftext|>`, and so is the end.

    by_template: a chat template has written them, around which a tokenizer puts nothing.
    """
    begin = tokenizer.encode if by_template else tokenizer.encode_prompt
    tokens: list[int] = []
    learnt: list[bool] = []
    for text, learn in pieces:
        try:
            text.encode()  # tiktoken would put U+FFFD for what is no text
        except UnicodeEncodeError:
            raise _BadLineError("it holds half of a surrogate pair, which is no text") from None
        ids = tokenizer.encode(text) if tokens else begin(text)
        if not tokens and (learn or not ids) and tokenizer.start_id is not None:
            tokens, learnt = [tokenizer.start_id], [False]
        tokens += ids
        learnt += [learn] * len(ids)
    end = tokenizer.eos_token_id
    if end is not None and (tokens[-1] not in tokenizer.eos_token_ids or len(tokens) == 1):
        tokens.append(end)
        learnt.append(True)
    if len(tokens) < 2:
        raise _BadLineError("there is nothing in it to learn from")
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
