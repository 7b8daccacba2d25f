"""A model's chat template: Jinja source, run in a sandbox, that turns messages into one text. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import TemplateRefused

ChatTemplate = Callable[[Sequence[Mapping[str, Any]], bool], str]  # messages, and whether the assistant speaks next


def compile_template(source: str, eos_token: str) -> ChatTemplate:
    """Raises TemplateRefused here where it is no template, and when it is used where it refuses the messages."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise TemplateRefused(f"the chat template is not one: {error}") from None

    def render(messages: Sequence[Mapping[str, Any]], assistant_next: bool) -> str:
        try:
            return template.render(
                messages=messages,
                add_generation_prompt=assistant_next,
                eos_token=eos_token,
                bos_token=eos_token,
                raise_exception=refuse,
            )
        except Exception as error:  # a template may do anything that an expression can
            raise TemplateRefused(f"the chat template refuses the messages: {str(error)[:200]}") from None

    return render
