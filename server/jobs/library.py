"""The fine-tuned models that are served: what the database lists is what the engine has, from start to end.

Knows nothing of how they are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from model.adapter_config import is_adapter
from model.config import ModelConfig
from model.errors import ModelError
from server.engine.engine import Engine
from server.errors import ModelNotFound, Overloaded
from server.jobs.jobs import JobStore
from server.jobs.records import FineTunedModel

log = logging.getLogger(__name__)

LOAD_TIMEOUT = 120  # seconds that workers get to read an adapter


@dataclass(frozen=True, slots=True)
class Origin:
    """Where training starts from."""

    model: Path
    adapter: Path | None
    is_base: bool  # the model is the one that is served, so that an adapter on it can be served beside it


class Library:
    def __init__(
        self, engine: Engine, jobs: JobStore, directory: Path, base_name: str, base: Path, config: ModelConfig
    ) -> None:
        """directory: of the data; base: of the model that is served by `base_name`."""
        self._engine = engine
        self._jobs = jobs
        self._directory = directory
        self.base_name = base_name
        self._base = base
        self.config = config
        self._mine: set[str] = set()  # names of ours that are served
        self._coming: set[str] = set()  # those that the database does not list yet
        self._refreshing = asyncio.Lock()
        self._unusable: set[str] = set()

    def restore(self) -> None:
        """Before anything runs: what the last server had."""
        for model in self._jobs.models_now():
            directory = self._directory / model.directory
            try:
                self._engine.variants.add(model.id, directory, model.created_at, lazy=_lazy(directory))
                self._mine.add(model.id)
            except ModelError as error:
                self._give_up(model.id, error)

    async def refresh(self) -> None:
        """What other servers have made or removed, too. Raises StorageError."""
        async with self._refreshing:
            listed = {model.id: model for model in await self._jobs.models()}
            for name in self._mine - self._coming - listed.keys():
                if self._engine.asleep:
                    return
                self._forget(name)
            for name in listed.keys() - self._mine - self._unusable:
                try:
                    await self._serve(listed[name])
                except (Overloaded, TimeoutError):
                    return  # the next time
                except ModelError as error:
                    self._give_up(name, error)

    async def introduce(self, models: Iterable[FineTunedModel]) -> None:
        """Serve what will be in the database soon, or after `settle` will be served no more.

        Raises ModelError where it cannot be. Where it cannot be now, it will be later.
        """
        for model in models:
            self._coming.add(model.id)
            with contextlib.suppress(Overloaded, TimeoutError):
                await self._serve(model)

    async def settle(self, models: Iterable[FineTunedModel]) -> None:
        """Raises StorageError."""
        self._coming -= {model.id for model in models}
        await self.refresh()

    async def _serve(self, model: FineTunedModel) -> None:
        """Raises ModelError where it cannot be, TimeoutError or Overloaded where it cannot be now."""
        if model.id in self._mine:
            return
        directory = self._directory / model.directory
        async with asyncio.timeout(LOAD_TIMEOUT):
            await self._engine.add_variant(model.id, directory, model.created_at, lazy=_lazy(directory))
        self._mine.add(model.id)

    async def remove(self, name: str, owner: str) -> None:
        """Its files too. Raises NotFound where it is none of the owner's, Overloaded while workers sleep."""
        if self._engine.asleep:
            raise Overloaded("The server is asleep; an operator has to wake it up (POST /wake_up).")
        model = await self._jobs.remove_model(name, owner)
        if name in self._mine:
            self._forget(name)
        await asyncio.to_thread(shutil.rmtree, self._directory / model.directory, ignore_errors=True)

    def origin(self, name: str) -> Origin:
        """Raises ModelNotFound."""
        if name == self.base_name:
            return Origin(self._base, None, is_base=True)
        variant = self._engine.variants.find(name)
        if variant is None:
            raise ModelNotFound(name)
        if is_adapter(variant.directory):
            return Origin(self._base, variant.directory, is_base=True)
        return Origin(variant.directory, None, is_base=False)

    def _forget(self, name: str) -> None:
        self._mine.discard(name)
        self._engine.remove_variant(name)

    def _give_up(self, name: str, error: ModelError) -> None:
        self._unusable.add(name)
        log.warning("a fine-tuned model is not served", extra={"model": name, "reason": str(error)})


def _lazy(directory: Path) -> bool:
    """Whole models are read when they are first asked for: there may be more of them than memory has room for."""
    return not is_adapter(directory)
