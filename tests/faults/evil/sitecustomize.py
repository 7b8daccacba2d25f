"""Makes a worker's forward pass misbehave. Python imports this by itself where its directory is on PYTHONPATH.

EVIL is `WHAT:WHEN`. WHAT: raise, exit, hang, or slow. WHEN: `step=K` (in the K-th step of each life), `step=any`, or
`token=ID` (in every step that computes this token).
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

SLEEPS = {"hang": 3600.0, "slow": 1.1}  # seconds

if "server.worker" in getattr(sys, "orig_argv", ()) and "EVIL" in os.environ:
    from model.runner import Runner

    what, when = os.environ["EVIL"].split(":")
    key, value = when.split("=")
    launch, steps = Runner.launch, 0

    def evil_launch(self: Runner, plan: Any) -> Any:
        global steps  # noqa: PLW0603
        steps += 1
        for new in plan.added:
            new_tokens[new.id] = [*new.prompt, *new.output]
        computed = [
            token
            for chunk in plan.chunks
            for token in new_tokens.get(chunk.id, [])[chunk.start : chunk.start + chunk.count]
        ]
        if (key == "step" and value in (str(steps), "any")) or (key == "token" and int(value) in computed):
            misbehave()
        pending = launch(self, plan)
        for sample in pending.result().sampled:
            new_tokens[sample.id].append(sample.token)
        return pending

    def misbehave() -> None:
        if what in SLEEPS:
            time.sleep(SLEEPS[what])
            return
        if what == "exit":
            os._exit(3)
        raise RuntimeError("evil")

    new_tokens: dict[int, list[int]] = {}
    Runner.launch = evil_launch  # type: ignore[method-assign]
