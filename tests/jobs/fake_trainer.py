"""A trainer that learns nothing in no time, by the contract of `model/training/finetune.py`. Its data says what it
does: each line's text is an order.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 4


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def main() -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    job = json.loads(Path(sys.argv[1]).read_bytes())
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "lives").open("a").write("x")
    orders = [json.loads(line)["text"] for line in Path(job["train"]).read_text().splitlines()]
    if "fail" in orders:
        problems = [{"line": n, "message": "it is not JSON"} for n in range(1, 31)]
        name = Path(job["train"]).name
        say(
            "failed",
            message=f"{name}, line 1: it is not JSON (and 29 more bad lines)",
            reason="data",
            problems=problems,
        )
        return 65
    if "nan" in orders:
        say("failed", message="the loss is no number any more", reason="loss")
        return 70
    if "full" in orders:
        say("failed", message="cannot read or write model.safetensors: No space left on device", reason="disk")
        return 74
    if "die" in orders:
        os.kill(os.getpid(), signal.SIGKILL)
    at = out / "at"
    first = int(at.read_text()) if at.exists() else 0
    if (out / "result.json").exists():
        say("finished", **json.loads((out / "result.json").read_bytes()))
        return 0
    about = {"steps": STEPS, "epochs": 2, "batch_size": 3, "examples": 6, "valid_examples": 0, "tokens": 50}
    say("started", **about, parameters=9, learning_rate=0.1, from_step=first, kind="adapter", notes=[])
    for step in range(first + 1, STEPS + 1):
        if "crash" in orders and step == 2 and len((out / "lives").read_text()) < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        while "wait" in orders and step == 2 and not stopped and not (out.parent / "go").exists():
            time.sleep(0.01)
        if stopped:
            at.write_text(str(step - 1))
            say("stopped", step=step - 1)
            return 75
        measured = {
            "valid_loss": None,
            "accuracy": 0.25,
            "valid_accuracy": None,
            "tokens": 10 * step,
            "learning_rate": 0.1,
            "seconds": 0.001,
        }
        say("step", step=step, steps=STEPS, epoch=step / 2, loss=5.0 - step, **measured)
        if step == 2:
            write(job, out / "checkpoints" / "step-2")
            say("checkpoint", step=2, path="checkpoints/step-2", loss=3.0, valid_loss=None)
        at.write_text(str(step))
    write(job, out / "model")
    (out / "log.csv").write_text(
        "step,tokens,done,loss,valid_loss,accuracy,valid_accuracy,tokens_per_second\n4,40,4.0,1.0,1.5,0.25,0.5,9\n"
    )
    result = {"step": 4, "epochs": 2.0, "tokens": 40, "loss": 1.0, "valid_loss": None, "kind": "adapter"}
    result |= {"path": "model", "early": False}
    (out / "result.json").write_text(json.dumps(result))
    say("finished", **result)
    return 0


def write(job: dict[str, Any], path: Path) -> None:
    path.mkdir(parents=True)
    shape = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (path / "adapter_config.json").write_text(json.dumps(shape))
    (path / "made_from").write_text(str(job["adapter"]))


if __name__ == "__main__":
    sys.exit(main())
