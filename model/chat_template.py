"""A chat template: messages to one text. Run as transformers runs it, in Jinja's sandbox. Imports no torch.

The template is the operator's and never a client's: what clients send is data that it is filled with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import TemplateRefused, TokenizerError
from model.files import CONFIG_BYTES, VOCABULARY_BYTES, is_file, read_object, read_text

SHOWN = 200  # characters of what a template says in its own words


class _Said(jinja2.TemplateError):
    """By the template itself, with raise_exception."""


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


class ChatTemplate:
    def __init__(self, source: str, *, named: Mapping[str, str]) -> None:
        """named: the special tokens that have a role, as bos_token. Raises TemplateRefused where it is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
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
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except _Said as error:
            said = "".join(c if c.isprintable() else " " for c in str(error.message)[:SHOWN])
            raise TemplateRefused(f"The chat template refuses these messages: {said}") from None
        except Exception:  # whatever an expression of the template's may raise on what a client sent
            raise TemplateRefused("The chat template cannot be filled with these messages.") from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Jinja's own escapes what HTML would mind."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Said(message)


def _strftime_now(shape: str) -> str:
    return datetime.now().strftime(shape)
