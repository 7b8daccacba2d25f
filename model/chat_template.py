"""A chat template: messages to one text. Run as transformers runs it, in Jinja's sandbox. Imports no torch.

The template is the operator's and never a client's: what clients send is data that it is filled with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import TemplateRefused

SHOWN = 200  # characters of what a template says in its own words


class _Said(jinja2.TemplateError):
    """By the template itself, with raise_exception."""


class _Generation(Extension):
    """{% generation %} marks for trainers what an assistant said. Here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
