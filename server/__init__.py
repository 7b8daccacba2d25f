"""The service: an OpenAI-compatible completion server for the GPT-2 family."""

from __future__ import annotations

__version__ = "0.1.0"
