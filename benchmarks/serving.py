"""What a client sees of a server, beside its peers: `python -m benchmarks.serving --model DIR --peer NAME=URL …`.

Starts our server, drives the same workloads through /v1/completions of each, round by round in turn, so that all see
the same machine, and prints the median of the rounds and the ratio to each peer. With --profile, where our time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

import model
from benchmarks import profile
from benchmarks.machine import machine, resident_mib
from server.load import Result, Server, Workload, bodies, closed_loop, started


def workloads(concurrencies: list[int]) -> list[Workload]:
    chat = [Workload(f"128 in / 64 out, {c} streams", 128, 64, c, max(4, 2 * c)) for c in concurrencies]
    return [
        *chat,
        Workload("900 in / 16 out, 4 streams", 900, 16, 4, 8),
        Workload("16 in / 512 out, 1 stream", 16, 512, 1, 2),
    ]


@dataclass(frozen=True, slots=True)
class Start:
    seconds: float  # from the command to the ready line
    resident_mib: float  # of all its processes, after the load


def measure(servers: list[Server], loads: list[Workload], rounds: int) -> dict[str, dict[str, list[Result]]]:
    """By workload, by server: one result a round."""
    results: dict[str, dict[str, list[Result]]] = {load.name: {s.name: [] for s in servers} for load in loads}
    for server in servers:
        asyncio.run(closed_loop(server, bodies(loads[0], seed=0)[:2], 2))  # warm
    for turn in range(rounds):
        for load in loads:
            for server in servers:
                result = asyncio.run(closed_loop(server, bodies(load, seed=turn + 1), load.concurrency))
                results[load.name][server.name].append(result)
    return results


def table(results: dict[str, dict[str, list[Result]]]) -> str:
    lines = [
        "| workload | server | tokens/s | ours ÷ it | TTFT mean, ms | ITL median, ms | ITL p99, ms | failed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, by_server in results.items():
        ours = median(result.tokens_per_second for result in by_server["gpt2-server"])
        for server, rounds in by_server.items():
            speed, ttft, itl, p99 = (
                median(getattr(result, field) for result in rounds)
                for field in ("tokens_per_second", "ttft_mean", "itl_median", "itl_p99")
            )
            failed = sum(result.failures for result in rounds)
            ratio = "" if server == "gpt2-server" else f"{ours / speed:.2f}"
            lines.append(
                f"| {name} | {server} | {speed:.0f} | {ratio} "
                f"| {1000 * ttft:.0f} | {1000 * itl:.1f} | {1000 * p99:.1f} | {failed} |"
            )
    return "\n".join(lines)


def watch(server: Server, process: psutil.Process, load: Workload) -> tuple[profile.Clocks, profile.Clocks]:
    """The server's clocks before and after one more round."""
    before = profile.read(server.url, process)
    asyncio.run(closed_loop(server, bodies(load, seed=0), load.concurrency))
    return before, profile.read(server.url, process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory; default: the embedded model")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="base URL with /v1")
    parser.add_argument("--peer-model", default="gpt2", help="model name that peers are asked for")
    parser.add_argument("--concurrency", default="1,8,32", help="streams, comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for every result")
    parser.add_argument("--profile", action="store_true", help="print where our time goes at the most streams")
    parser.add_argument("flags", nargs="*", help="after --: flags for our server")
    arguments = parser.parse_args()
    concurrencies = sorted(int(each) for each in arguments.concurrency.split(","))
    loads = workloads(concurrencies)
    busiest = loads[len(concurrencies) - 1]
    clocks: tuple[profile.Clocks, profile.Clocks] | None = None
    with started(arguments.model, arguments.flags) as (ours, seconds, pid):
        peers = [Server(name, url, arguments.peer_model) for name, _, url in (p.partition("=") for p in arguments.peer)]
        results = measure([ours, *peers], loads, arguments.rounds)
        process = psutil.Process(pid)
        clocks = watch(ours, process, busiest) if arguments.profile else None
        start = Start(seconds, resident_mib(process))
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; median of {arguments.rounds} interleaved rounds; greedy\n")
    print(table(results))
    print(f"\nStart to ready: {start.seconds:.1f} s. Resident after the load: {start.resident_mib:.0f} MiB.")
    if clocks is not None:
        directory = Path(arguments.model) if arguments.model else Path(model.__file__).parent / "default"
        run = profile.parts_of_run(directory, arguments.flags, busiest.concurrency)
        print(f"\n{profile.measured(*clocks, run).table(busiest.name)}")
    if arguments.json:
        plain = {load: {s: [asdict(r) for r in rs] for s, rs in by.items()} for load, by in results.items()}
        arguments.json.write_text(
            json.dumps({"machine": machine(), "start": asdict(start), "results": plain}, indent=1)
        )


if __name__ == "__main__":
    main()
