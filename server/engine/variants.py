"""The models served beside the one that was asked for, by name: LoRA adapters on it, and fine-tuned models like it.

This is the list; what is loaded is the business of each worker. A name can go and come back with other weights, so each
time it gets a key of its own, which is what workers and prefix caches know it by.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.adapter_config import is_adapter, read_adapter_config
from model.config import ModelConfig, check_variant, read_config
from model.errors import ModelError
from model.files import is_file
from server.worker.messages import Load, Loaded


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    key: str
    directory: Path
    created: int  # unix seconds
    fingerprint: str  # of its files
    lazy: bool  # read when it is first asked for, not before

    @property
    def load(self) -> Load:
        return Load(self.key, str(self.directory), self.lazy)

    @property
    def salt(self) -> bytes:
        """Keeps its prefixes apart from those of others."""
        return hashlib.sha256(self.key.encode()).digest()


class Variants:
    def __init__(self, base: ModelConfig) -> None:
        self._base = base
        self._numbers = itertools.count(1)
        self._by_name: dict[str, Variant] = {}
        self._loading: dict[str, asyncio.Queue[tuple[int, Loaded]]] = {}  # by key
        self._required: dict[str, str] = {}  # names by key: without them there is no service; until they are loaded

    def add(
        self, name: str, directory: Path, created: int | None = None, *, lazy: bool = False, required: bool = False
    ) -> Variant:
        """Raises ModelError where its description does not fit; its weights the workers will check.

        required: a worker that cannot load it, before any could, ends the service.
        """
        if name in self._by_name:
            raise ModelError(f"a model named {name} is served already")
        if is_adapter(directory):
            read_adapter_config(directory)
        else:
            check_variant(read_config(directory), self._base)
        key = f"{name}#{next(self._numbers)}"
        if required:
            self._required[key] = name
        made = int(time.time()) if created is None else created
        self._by_name[name] = Variant(name, key, directory, made, _fingerprint(directory), lazy)
        return self._by_name[name]

    def remove(self, name: str) -> Variant:
        return self._by_name.pop(name)

    def find(self, name: str) -> Variant | None:
        return self._by_name.get(name)

    def __iter__(self) -> Iterator[Variant]:
        return iter(list(self._by_name.values()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    # === What workers say ===

    async def loaded(self, variant: Variant, workers: int) -> None:
        """Returns once so many workers have it. Raises ModelError, with the reason, where one cannot load it.

        A worker that dies is replaced by one that answers for it, perhaps for the second time.
        """
        answers = self._loading[variant.key] = asyncio.Queue()
        have = set[int]()
        try:
            while len(have) < workers:
                worker, answer = await answers.get()
                if answer.error is not None:
                    raise ModelError(answer.error)
                have.add(worker)
        finally:
            del self._loading[variant.key]

    def tell(self, worker: int, loaded: Loaded) -> str | None:
        """Returns why there can be no service, where there cannot."""
        if loaded.key in self._loading:
            self._loading[loaded.key].put_nowait((worker, loaded))
        name = self._required.pop(loaded.key, None)
        return None if name is None or loaded.error is None else f"{name}: {loaded.error}"

    @property
    def complete(self) -> bool:
        """Whether a worker has loaded each of those that are required."""
        return not self._required


def _fingerprint(directory: Path) -> str:
    """As far as sizes and times tell."""
    digest = hashlib.sha256()
    for path in filter(is_file, sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")])):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:8]
