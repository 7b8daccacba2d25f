"""The operator's chat template as the api uses it: read from its file, its complaints the client's. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from model.chat_template import ChatTemplate as Template
from model.errors import TemplateRefused
from model.files import read_text
from server.errors import InvalidRequest, SettingsError

FILE_BYTES_MAX = 1 << 20

Message = dict[str, str]  # role, content, and name where there is one


class ChatTemplate:
    def __init__(self, source: str, *, named: Mapping[str, str]) -> None:
        """Raises SettingsError where it is no template."""
        try:
            self._template = Template(source, named=named)
        except TemplateRefused as error:
            raise SettingsError(str(error)) from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Raises InvalidRequest where the template does not take these messages."""
        try:
            return self._template.render(messages, add_generation_prompt=add_generation_prompt)
        except TemplateRefused as error:
            raise InvalidRequest(str(error), "messages") from None


def read_chat_template(path: Path, *, named: Mapping[str, str]) -> ChatTemplate:
    """Raises SettingsError."""
    source = read_text(path, FILE_BYTES_MAX, lambda why: SettingsError(f"the chat template cannot be used: {why}"))
    return ChatTemplate(source, named=named)
