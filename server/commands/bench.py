"""`gpt2-server bench [URL]`: a short load of an OpenAI-compatible server, as a table; without a URL, of our own.

The prompts are random tokens, no two alike, so that no cache helps. `make bench` compares servers, for longer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import SettingsError
from server.load import Result, Server, Workload, bodies, closed_loop, started

HEAD = f"{'streams':>7} {'tokens/s':>9} {'req/s':>7} {'TTFT ms':>8} {'ITL ms':>7} {'ITL p99':>8} {'failed':>7}"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", metavar="URL", help="with or without /v1; none starts the default model")
    parser.add_argument("--model", default="", metavar="NAME", help="to ask for; without a URL: to serve")
    parser.add_argument("--concurrency", default="1,8,32", metavar="N,…", help="streams at once, in turn [1,8,32]")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="[128]")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="[64]")
    parser.add_argument("--requests", type=int, metavar="N", help="of each concurrency [twice as many, 4 at least]")


def run(arguments: argparse.Namespace) -> int:
    loads = _workloads(arguments)
    try:
        with _server(arguments) as server:
            asyncio.run(closed_loop(server, bodies(loads[0], seed=0)[:1], 1))  # warm
            print(f"{arguments.prompt_tokens} tokens in, {arguments.max_tokens} out, greedy\n\n{HEAD}")
            for turn, load in enumerate(loads):
                print(_row(load, asyncio.run(closed_loop(server, bodies(load, seed=turn + 1), load.concurrency))))
    except (RuntimeError, ValueError) as error:
        raise SettingsError(str(error)) from None
    return 0


def _workloads(arguments: argparse.Namespace) -> list[Workload]:
    try:
        streams = [int(each) for each in arguments.concurrency.split(",")]
    except ValueError:
        raise SettingsError("--concurrency: whole numbers, with commas between") from None
    if min(streams) < 1 or arguments.prompt_tokens < 1 or arguments.max_tokens < 1:
        raise SettingsError("streams and tokens: 1 at least")
    return [
        Workload("", arguments.prompt_tokens, arguments.max_tokens, each, arguments.requests or max(4, 2 * each))
        for each in streams
    ]


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[Server]:
    """The key, if the server wants one, is OPENAI_API_KEY's, as for OpenAI's own client."""
    if arguments.url is None:
        with started(arguments.model or None, ["--log-level", "error"]) as (server, seconds, _):
            print(f"ready after {seconds:.1f} s")
            yield server
    else:
        url = arguments.url.rstrip("/")
        url = url if url.endswith("/v1") else f"{url}/v1"
        yield Server("", url, arguments.model, os.environ.get("OPENAI_API_KEY"))


def _row(load: Workload, result: Result) -> str:
    return (
        f"{load.concurrency:>7} {result.tokens_per_second:>9,.0f} {result.requests_per_second:>7.1f} "
        f"{1000 * result.ttft_mean:>8.0f} {1000 * result.itl_median:>7.1f} {1000 * result.itl_p99:>8.1f} "
        f"{result.failures:>7}"
    )
