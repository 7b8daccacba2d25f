"""Stands in for `gpt2-server` where pages are run: the same program, but `serve` leaves as soon as it is ready."""

from __future__ import annotations

import os
import subprocess
import sys

command = [sys.executable, "-m", "server.cli", *sys.argv[1:]]
if sys.argv[1:2] != ["serve"] or {"-h", "--help"} & set(sys.argv):
    sys.exit(subprocess.call(command))
with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env={**os.environ, "GPT2_SERVER_PORT": "0"}
) as process:
    assert process.stdout is not None
    ready = False
    for line in process.stdout:
        print(line, end="", flush=True)
        if "Serving on" in line:
            ready = True
            process.terminate()
sys.exit(process.returncode or not ready)
