from __future__ import annotations

from outside import environment

__all__ = ["environment"]
