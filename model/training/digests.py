"""What files hold, in a few characters: how a job that goes on knows that its data and its model are still the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from model.files import is_file

OF_A_MODEL = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def digest_of(path: str | None) -> str:
    """Of a file's bytes, or of the files in a directory that make a model or an adapter. Empty where there is none: who
    reads it says so."""
    if path is None:
        return ""
    whole = Path(path)
    if not whole.is_dir():
        return _digest(whole) if is_file(whole) else ""
    files = sorted({each for pattern in OF_A_MODEL for each in whole.glob(pattern) if is_file(each)})
    digest = hashlib.sha256()
    for each in files:
        digest.update(f"{each.name}\0{_digest(each)}\n".encode())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    """Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
