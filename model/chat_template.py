"""A chat template: messages to one text. Run as transformers runs it, in Jinja's sandbox. Imports no torch.

The template is the operator's and never a client's: what clients send is data that it is filled with.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import TemplateRefused, TokenizerError
from model.files import CONFIG_BYTES, VOCABULARY_BYTES, is_file, read_object, read_text

RENDER_SECONDS = 0.5  # of processor time, for one list of messages
RENDERED_MAX = 1 << 22  # characters
POWER_BITS_MAX = 1 << 16
TEMPLATE_FILE = "<template>"  # where Jinja says that the code of a template without a file is
SHOWN = 200  # characters of what a template says in its own words


Trace = Callable[[FrameType, str, object], Any]  # as sys.settrace takes it


class _Said(jinja2.TemplateError):
    """By the template itself, with raise_exception."""


class _TooLong(jinja2.TemplateError):
    """It takes more time, or writes more, than it may."""


class _Generation(Extension):
    """{% generation %} marks for trainers what an assistant said. Here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def find_chat_template(directory: Path) -> str | None:
    """Of a model's files, as transformers finds it: chat_template.jinja, else what tokenizer_config.json has.

    Raises TokenizerError where such a file cannot be read.
    """
    if is_file(directory / "chat_template.jinja"):
        return read_text(directory / "chat_template.jinja", CONFIG_BYTES, TokenizerError)
    if not is_file(directory / "tokenizer_config.json"):
        return None
    found = read_object(directory / "tokenizer_config.json", VOCABULARY_BYTES, TokenizerError).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


class _Environment(ImmutableSandboxedEnvironment):
    """Where one operation cannot make more than a template may write, nor take long by itself."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(each) for each in (left, right) if isinstance(each, str | list | tuple)]
        times = [each for each in (left, right) if isinstance(each, int)]
        if sizes and times and sizes[0] * times[0] > RENDERED_MAX:
            raise _TooLong
        if operator == "**" and len(times) == 2 and left.bit_length() * right > POWER_BITS_MAX:
            raise _TooLong
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    def __init__(self, source: str, *, named: Mapping[str, str]) -> None:
        """named: the special tokens that have a role, as bos_token. Raises TemplateRefused where it is no template."""
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRefused(f"the chat template is wrong in line {error.lineno}: {error.message}") from None
        self._tokens = {"bos_token": "", "eos_token": "", **named}

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """messages: role, content, and name where there is one. Raises TemplateRefused where it does not take them."""
        values = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **self._tokens}
        try:
            with _limited(RENDER_SECONDS):
                return _joined(self._template.generate(tools=None, documents=None, **values))
        except _TooLong:
            raise TemplateRefused("The chat template takes too long with these messages.") from None
        except _Said as error:
            said = "".join(c if c.isprintable() else " " for c in str(error.message)[:SHOWN])
            raise TemplateRefused(f"The chat template refuses these messages: {said}") from None
        except Exception:  # whatever an expression of the template's may raise on what a client sent
            raise TemplateRefused("The chat template cannot be filled with these messages.") from None


def _joined(pieces: Iterable[str]) -> str:
    text, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > RENDERED_MAX:
            raise _TooLong
        text.append(piece)
    return "".join(text)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooLong in this thread's template code once it has had so much processor time.

    A loop of a template asks nobody before its next turn, so each of its lines is traced; those of other code are not.
    """
    end = time.thread_time() + seconds

    def trace(frame: FrameType, event: str, argument: object) -> Trace | None:
        if frame.f_code.co_filename != TEMPLATE_FILE:
            return None
        if time.thread_time() > end:
            raise _TooLong
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Jinja's own escapes what HTML would mind."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Said(message)


def _strftime_now(shape: str) -> str:
    return datetime.now().strftime(shape)
