"""The file of keys, and finding a key among them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from server.api.keys import Caller, Key, Keyring, key_digest, load_keys
from server.errors import SettingsError
from server.settings import parse


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(0o600)
    return path


def test_names_digests_comments_and_two_keys_of_one_name(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(
        f"# ours\n\n  team-a: sk-1\nteam-a:sk-2\nCI.7 : sha256:{key_digest('sk-3').hex()}\nx: a:b:c\n", "utf-8"
    )
    ring = Keyring(load_keys("sk-0", str(file)))
    found = {key: ring.find(key) for key in (b"sk-0", b"sk-1", b"sk-2", b"sk-3", b"a:b:c", b"sk-4", b"", b"\xff")}
    names = ["default", "team-a", "team-a", "CI.7", "x"]
    assert list(found.values()) == [*map(Caller, names), None, None, None]
    assert not caplog.records


@pytest.mark.parametrize(("text", "line"), [
    ("", "holds no key"), ("# a: b\n", "holds no key"), ("a sk-secret", "line 1 is not"), ("a:", "line 1 is not"),
    ("\na b: sk-secret", "line 2 is not"), ("a: sk-secret more", "line 1 is not"), (f"{'a' * 65}: k", "line 1 is not"),
    ("é: sk-secret", "line 1 is not"), ("a: sha256:00", "not 64 hex digits"),
    ("a: sk-secret\nb: sk-secret", "a key twice"), ("\udcff", "not text in UTF-8"),
], ids=ascii)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_and_not_quoted(text: str, line: str, file: Path) -> None:
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError, match=line) as refused:
        load_keys(None, str(file))
    assert "secret" not in str(refused.value)
    assert "é" not in str(refused.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read the key file: No such file"):
        load_keys(None, str(tmp_path / "none"))
    assert load_keys(None, None) == []


def test_a_file_that_everybody_can_read_is_said(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("a: sk-secret")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        load_keys(None, str(file))
    assert "chmod 600" in caplog.text
    assert "secret" not in caplog.text


def test_keys_can_be_replaced() -> None:
    ring = Keyring([Key("a", key_digest("old"))])
    ring.replace([Key("a", key_digest("new"))])
    assert (ring.find(b"old"), ring.find(b"new")) == (None, Caller("a"))


def test_the_key_of_the_environment_is_not_left_for_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_SERVER_API_KEY", "sk-secret")
    settings = parse([])
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "sk-secret"
    assert "secret" not in repr(settings)
    assert parse([]).api_key is None
