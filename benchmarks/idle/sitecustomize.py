"""Gives a worker the device that does nothing. Python imports this by itself where its directory is on PYTHONPATH."""

from __future__ import annotations

import sys

if "server.worker" in getattr(sys, "orig_argv", ()):
    from benchmarks import host
    from server.worker import parts

    parts.make_runner = host.make_idle_runner
