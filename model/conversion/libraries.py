"""Libraries of the extra [convert]: large, for a few formats only, and so imported by whoever needs one of them."""

from __future__ import annotations

import importlib
from types import ModuleType

from model.errors import ConversionError


def needed(library: str) -> ModuleType:
    """Raises ConversionError that says how to get it."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ConversionError(f"this format takes the library {library}: pip install 'gpt2-server[convert]'") from None
