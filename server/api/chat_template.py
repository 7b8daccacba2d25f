"""The operator's chat template as the api uses it: read from its file, its complaints the client's. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from model.chat_template import ChatTemplate as Template
from model.chat_template import find_chat_template
from model.errors import TemplateRefused
from model.files import read_text
from server.errors import InvalidRequest, SettingsError

FILE_BYTES_MAX = 1 << 20
AUTO = "auto"  # the template is one of the model's files

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


def chat_template_source(setting: str | None, directory: Path) -> str | None:
    """The template that the setting asks for: a file, or with `auto` the one among the model's files.

    Raises SettingsError.
    """
    if setting is None:
        return None
    if setting != AUTO:
        path = Path(setting).expanduser()
        return read_text(path, FILE_BYTES_MAX, lambda why: SettingsError(f"the chat template cannot be used: {why}"))
    found = find_chat_template(directory)
    if found is None:
        raise SettingsError("the model's files hold no chat template: --chat-template needs a file")
    return found
