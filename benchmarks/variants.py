"""What adapters cost: tokens a second of streams of one model, of one adapter, and of all of them together.

`python -m benchmarks.variants --url http://127.0.0.1:8000 MODEL ADAPTER ADAPTER …`, against a server that has them.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import httpx

PROMPT = "The harbour master wrote that evening, before the lamp was lit, "


async def run(url: str, models: list[str], streams: int, tokens: int) -> float:
    """Tokens a second of all streams, which take the models in turn."""
    async with httpx.AsyncClient(timeout=300) as client:

        async def ask(number: int) -> int:
            body = {
                "model": models[number % len(models)], "prompt": PROMPT, "max_tokens": tokens, "seed": number,
                "ignore_eos": True,
            }  # fmt: skip
            answer = await client.post(f"{url}/v1/completions", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        began = time.perf_counter()
        made = sum(await asyncio.gather(*[ask(number) for number in range(streams)]))
        return made / (time.perf_counter() - began)


async def compare(url: str, base: str, adapters: list[str], streams: list[int], tokens: int, rounds: int) -> None:
    mixes = {"the model": [base], "one adapter": adapters[:1], "the model and all adapters": [base, *adapters]}
    print("| streams | " + " | ".join(mixes) + " |\n| --- |" + " --- |" * len(mixes))
    for count in streams:
        best = dict.fromkeys(mixes, 0.0)
        for _ in range(rounds):
            for name, models in mixes.items():
                best[name] = max(best[name], await run(url, models, count, tokens))
        print(f"| {count} | " + " | ".join(f"{speed:.0f}" for speed in best.values()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the model, then adapters")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    asyncio.run(compare(args.url, args.models[0], args.models[1:], args.streams, args.tokens, args.rounds))


if __name__ == "__main__":
    main()
