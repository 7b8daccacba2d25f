"""The keys of those who may ask, known by their digests alone, under names for quotas, caches, metrics and logs.

A file has one `name: key` a line; a key may stand there as `sha256:` and its digest in hex, and then the file holds no
secret. Several lines may have one name, so that a key can be replaced without a moment when none is valid.
"""

from __future__ import annotations

import hashlib
import logging
import re
import stat
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path

from server.errors import SettingsError

log = logging.getLogger(__name__)

LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s*:\s*(\S+)")
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
DEFAULT_NAME = "default"  # of the one key that comes without a name


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. Nobody in particular on a server without keys."""

    name: str = ""
    address: str = ""  # where it came from

    @property
    def client(self) -> str:
        """Among whom the server's work is shared: a key, or where there are none an address."""
        return self.name or self.address


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    digest: bytes  # sha256


class Keyring:
    """Finds the caller of a key. Replacing the keys takes effect with the next request."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = keys

    def find(self, sent: bytes) -> Caller | None:
        """Looks at every key, however early one matches: time tells nothing."""
        digest = hashlib.sha256(sent).digest()
        found: str | None = None
        for key in self._keys:
            if compare_digest(key.digest, digest):
                found = key.name
        return None if found is None else Caller(found)

    def replace(self, keys: list[Key]) -> None:
        self._keys = keys


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def load_keys(single: str | None, path: str | None) -> list[Key]:
    """The key without a name, and those of the file. Raises SettingsError, which shows no part of a key."""
    keys = [] if single is None else [Key(DEFAULT_NAME, key_digest(single))]
    return keys if path is None else keys + _read_file(Path(path))


def _read_file(path: Path) -> list[Key]:
    try:
        text, mode = path.read_text("utf-8"), path.stat().st_mode
    except OSError as error:
        raise SettingsError(f"cannot read the key file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError("the key file is not text in UTF-8") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warning(
            "everybody on this machine can read the key file: chmod 600 would keep it", extra={"mode": oct(mode)}
        )
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = [_read_line(number, line) for number, line in lines if line and not line.startswith("#")]
    if not keys:
        raise SettingsError("the key file holds no key")
    if len({key.digest for key in keys}) < len(keys):
        raise SettingsError("the key file holds a key twice")
    return keys


def _read_line(number: int, line: str) -> Key:
    match = LINE.fullmatch(line)
    if match is None:
        raise SettingsError(f"the key file's line {number} is not `name: key`, the name of letters, digits and ._-")
    name, key = match.groups()
    digest = DIGEST.fullmatch(key)
    if digest is None and key.startswith("sha256:"):
        raise SettingsError(f"the key file's line {number} has a digest that is not 64 hex digits")
    return Key(name, key_digest(key) if digest is None else bytes.fromhex(digest[1]))
