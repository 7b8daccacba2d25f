"""Models that are served beside the one that was asked for: LoRA adapters on it, and whole networks like it.

An adapter that is more than low-rank pairs of the layers is merged into a network of its own. All share its KV cache,
so a network must have its width, heads and vocabulary, and no more layers; what was fine-tuned or distilled from it
has. They are read when they are first used and kept, the latest used first, within a bound of
memory. Knows nothing of requests or of who may use what.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass
from math import prod
from pathlib import Path

from model.adapter_config import is_adapter
from model.adapter_file import check_pairs, read_adapter
from model.adapter_merging import merge_adapter
from model.adapters import Adapter
from model.config import ModelConfig, check_shape, read_config
from model.errors import AdapterError, WeightsError
from model.gpt2 import GPT2
from model.ops import Ops
from model.weights import Progress, as_stored, expected_shapes, read_weights


@dataclass(frozen=True, slots=True)
class Variant:
    network: GPT2
    adapter: Adapter | None
    bytes: int


class Variants:
    """By key, of which none is ever used twice."""

    def __init__(self, network: GPT2, ops: Ops, max_bytes: int, base: Path) -> None:
        """max_bytes: of those that are loaded; exceeded only while all of them are in use, or by a single one.

        base: the directory of the network, whose weights are read again for an adapter that is merged into them.
        """
        self._network = network
        self._base = base
        self._ops = ops
        self._max_bytes = max_bytes
        self._directories: dict[str, Path] = {}
        self._loaded: OrderedDict[str, Variant] = OrderedDict()  # least recently used first

    def register(self, key: str, directory: Path) -> None:
        self._directories[key] = directory

    def use(self, key: str, in_use: Set[str], progress: Progress | None = None) -> Variant:
        """Load it, or keep it a little longer. Raises ModelError.

        in_use: keys that may not be given up. progress: told again and again while weights are read and merged.
        """
        if key not in self._directories:
            raise WeightsError(f"no model {key} is known")
        if key not in self._loaded:
            self._loaded[key] = self._load(self._directories[key], progress)
            self._evict(in_use | {key})
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def get(self, key: str) -> Variant:
        """One in use."""
        return self._loaded[key]

    def forget(self, key: str) -> None:
        """Nobody uses it, and nobody will."""
        self._directories.pop(key, None)
        self._loaded.pop(key, None)

    @property
    def bytes(self) -> int:
        return sum(variant.bytes for variant in self._loaded.values())

    def _evict(self, kept: Set[str]) -> None:
        for key in [key for key in self._loaded if key not in kept]:
            if self.bytes <= self._max_bytes:
                return
            del self._loaded[key]

    def _load(self, directory: Path, progress: Progress | None) -> Variant:
        if is_adapter(directory):
            return self._load_adapter(directory, progress)
        config = read_config(directory)
        check_shape(config, self._network.config)
        weights = read_weights(directory, config, progress)
        config = as_stored(config, weights)
        return Variant(GPT2(config, weights, self._ops), None, _bytes(config))

    def _load_adapter(self, directory: Path, progress: Progress | None) -> Variant:
        """Beside the network where it is low-rank pairs alone; else as a network of its own, merged with the base."""
        base = self._network.config
        described, tensors = read_adapter(directory, base)
        if tensors.is_plain(described):
            check_pairs(tensors, base)
            adapter = Adapter(tensors.sites(), self._ops)
            return Variant(self._network, adapter, adapter.bytes)
        weights = read_weights(self._base, base, progress)
        config, merged = merge_adapter(base, weights, described, tensors, progress)
        if config.vocab_size != base.vocab_size:
            raise AdapterError(
                f"the adapter has {config.vocab_size} tokens and the model {base.vocab_size}: merge the two into a "
                "model of its own (gpt2-server export MODEL DEST --merge ADAPTER)"
            )
        return Variant(GPT2(config, merged, self._ops), None, _bytes(config))


def _bytes(config: ModelConfig) -> int:
    return 4 * sum(map(prod, expected_shapes(config).values()))
