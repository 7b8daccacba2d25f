"""Starts the process that opens a foreign file, waits for it, and puts what it made in place. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from model.errors import ConversionError

SECONDS = 300  # for any file
SECONDS_PER_GIB = 300  # more, for a large one
_INHERITED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """The last line of the process."""

    error: str | None = None
    format: str = ""
    files: list[str] = []


@dataclass(frozen=True, slots=True)
class Converted:
    directory: Path
    format: str  # in words
    files: tuple[str, ...]  # that were read


def convert(source: Path, destination: Path, tokenizer: Path | None = None) -> Converted:
    """Nothing is at `destination` before all of it is. Raises ConversionError."""
    with in_place_of(destination) as unfinished:
        arguments = ["model", str(source.absolute()), str(unfinished.absolute())]
        if tokenizer is not None:
            arguments.append(str(tokenizer.absolute()))
        answer = _run(arguments, _size(source))
    return Converted(destination, answer.format, tuple(answer.files))


def read_pickled_tensors(source: Path, destination: Path) -> None:
    """Writes the tensors of a pickled file as safetensors. Raises ConversionError."""
    _run(["tensors", str(source.absolute()), str(destination.absolute())], _size(source))


@contextmanager
def in_place_of(destination: Path) -> Iterator[Path]:
    """A new directory that becomes `destination` at the end, by one rename; or is removed. Raises ConversionError."""
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ConversionError(f"{destination.name} is there already")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise ConversionError(f"cannot write beside {destination.name}: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.chmod(0o777 & ~_umask())
        unfinished.rename(destination)
    except OSError as error:
        raise ConversionError(f"cannot write {destination.name}: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _run(arguments: list[str], size: int) -> Answer:
    seconds = SECONDS + SECONDS_PER_GIB * size // (1 << 30)
    command = [sys.executable, "-m", "model.conversion", str(seconds), *arguments]
    env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    env["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ConversionError(f"reading it took more than {seconds} s") from None
    finally:
        process.kill()
        process.wait()
    if process.returncode == -signal.SIGXCPU:
        raise ConversionError(f"reading it took more than {seconds} s")
    try:
        answer = msgspec.json.decode(output, type=Answer)
    except msgspec.DecodeError:
        raise ConversionError("reading it ended the process that tried: the file is damaged or hostile") from None
    if answer.error is not None:
        raise ConversionError(answer.error)
    return answer


def _size(source: Path) -> int:
    """Of what may be read, in bytes."""
    try:
        files = [source] if source.is_file() else [path for path in source.iterdir() if path.is_file()]
        return sum(path.stat().st_size for path in files)
    except OSError as error:
        raise ConversionError(f"cannot read {source.name}: {error.strerror}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def encode(answer: Answer) -> str:
    return json.dumps(msgspec.to_builtins(answer))
