"""What has state between tokens (grammars, DRY, coins, beams) goes on in another worker as if nothing had happened."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mixed import until
from serving import serving

LETTERS = list(range(64, 80))
REQUESTS: list[dict[str, Any]] = [
    {"guided_regex": "([a-z] ){200}", "max_tokens": 500},
    {"guided_json": {"type": "array", "items": {"type": "integer"}, "minItems": 150}, "max_tokens": 500},
    {"dry_multiplier": 5.0, "xtc_probability": 0.5, "allowed_token_ids": LETTERS, "max_tokens": 300},
    {"use_beam_search": True, "n": 3, "max_tokens": 200},
]  # fmt: skip


def test_a_killed_worker_changes_no_byte_of_them(tiny: Path) -> None:
    requests = [{"prompt": "a b c", "seed": i, "logprobs": 1, **fields} for i, fields in enumerate(REQUESTS)]
    with serving(tiny, "--threads", "1") as server, ThreadPoolExecutor(len(requests)) as pool:
        expected = [server.complete(**request)["choices"] for request in requests]
        before = server.metrics()["gpt2_generation_tokens_total"]
        answers = [pool.submit(lambda request=request: server.complete(**request)["choices"]) for request in requests]
        until(lambda: server.metrics()["gpt2_generation_tokens_total"] >= before + 40)
        assert not any(answer.done() for answer in answers), "too late to kill anything"
        os.kill(server.worker_pid, signal.SIGKILL)
        assert [answer.result() for answer in answers] == expected
        assert server.metrics()["gpt2_worker_restarts_total"] == 1
