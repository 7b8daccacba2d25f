"""Writes Grafana's dashboards into docker/grafana/dashboards.

python scripts/make_dashboards.py [DIRECTORY]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from panels import (
    DATASOURCE,
    DOCKER,
    Panel,
    events,
    gauge,
    heatmap,
    known,
    mean,
    placed,
    process,
    quantile,
    quantiles,
    rate,
    recorded,
    share,
    stat,
)

OVERVIEW = [
    stat("Requests in flight", gauge("requests_in_flight"), text="Requests admitted that have not ended"),
    stat("Tokens out / s", rate("generation_tokens")),
    stat("Tokens in / s", rate("prompt_tokens"), text="Those found in the prefix cache too"),
    stat("First token, p95", quantile(0.95, "time_to_first_token_seconds"), "s"),
    stat("Next token, p95", quantile(0.95, "inter_token_latency_seconds"), "s"),
    stat("Workers", gauge("engine_up"), text="That are there, asleep or awake"),
    Panel(title="HTTP answers / s", shows={"{{status}}": rate("http_requests", "status")}, unit="reqps", stacked=True),
    Panel(
        title="Requests ended / s",
        shows={"{{finished_reason}}": rate("request_success", "finished_reason")},
        unit="reqps",
        stacked=True,
    ),
    Panel(title="Calls refused / s", shows={"{{reason}}": rate("requests_rejected", "reason")}, unit="reqps"),
    quantiles("Time to first token", "time_to_first_token_seconds"),
    quantiles("Time between tokens", "inter_token_latency_seconds"),
    quantiles("Arrival to end", "e2e_request_latency_seconds"),
    Panel(title="Tokens / s", shows={"in": rate("prompt_tokens"), "out": rate("generation_tokens")}),
    Panel(
        title="Requests",
        shows={"running": gauge("num_requests_running"), "waiting": gauge("num_requests_waiting")},
        stacked=True,
    ),
    Panel(
        title="KV cache in use", shows={"fullest": gauge("kv_cache_usage_perc", of="max")}, unit="percentunit", most=1
    ),
    Panel(
        title="Objective met",
        shows={
            "first token within 1 s": recorded("job:gpt2_ttft_within_1s:ratio_rate5m"),
            "next token within 100 ms": recorded("job:gpt2_itl_within_100ms:ratio_rate5m"),
        },
        unit="percentunit",
        most=1,
        text="Share of the last five minutes; alerts below 95 %",
    ),
    Panel(
        title="Errors",
        shows={
            "5xx": recorded("job:gpt2_http_errors:ratio_rate5m"),
            "refused": recorded("job:gpt2_rejections:ratio_rate5m"),
            "failed after admission": recorded("job:gpt2_request_errors:ratio_rate5m"),
        },
        unit="percentunit",
    ),
    Panel(title="Versions", shows={"{{version}} on {{instance}}": gauge("build_info", "version", "instance")}),
]

ENGINE = [
    quantiles("Step", "engine_step_seconds"),
    Panel(
        title="What the time of steps goes into",
        shows={"{{part}}": rate("engine_step_part_seconds", "part")},
        unit="percentunit",
        stacked=True,
        text="Seconds per second, of all workers together",
    ),
    Panel(title="Steps / s", shows={"steps": events("engine_step_seconds")}),
    heatmap("Requests in a step", "batch_size"),
    heatmap("Tokens in a step", "batch_tokens"),
    Panel(
        title="Means of a step",
        shows={"requests": mean("batch_size"), "tokens": mean("batch_tokens")},
    ),
    Panel(title="KV blocks", shows={"{{state}}": gauge("kv_blocks", "state")}, stacked=True),
    Panel(title="Preemptions / s", shows={"preemptions": rate("num_preemptions")}),
    Panel(
        title="Prefix cache hits",
        shows={"tokens found": share(rate("prefix_cache_hits"), rate("prefix_cache_queries"))},
        unit="percentunit",
        most=1,
    ),
    Panel(
        title="Guesses that were right",
        shows={"right": share(rate("spec_decode_num_accepted_tokens"), rate("spec_decode_num_draft_tokens"))},
        unit="percentunit",
        most=1,
        text="Of speculative decoding; empty where it is off",
    ),
    Panel(
        title="Tokens a run of guesses gains",
        shows={"tokens": share(rate("spec_decode_num_accepted_tokens"), rate("spec_decode_num_drafts"))},
    ),
    Panel(
        title="Right guesses / s, by place",
        shows={"{{position}}": rate("spec_decode_num_accepted_tokens_per_pos", "position")},
    ),
    quantiles("Event loop lag", "event_loop_lag_seconds", text="Of the api process"),
    Panel(
        title="CPU of the api process", shows={"{{instance}}": process("process_cpu_seconds_total")}, unit="percentunit"
    ),
    Panel(
        title="Memory of the api process",
        shows={"{{instance}}": process("process_resident_memory_bytes")},
        unit="bytes",
    ),
    Panel(
        title="File descriptors of the api process",
        shows={"open": process("process_open_fds"), "limit": process("process_max_fds")},
    ),
]

REQUESTS = [
    quantiles("Waiting for the first step", "request_queue_time_seconds"),
    quantiles("First step to first token", "request_prefill_time_seconds"),
    quantiles("First token to last", "request_decode_time_seconds"),
    quantiles("First step to last token", "request_inference_time_seconds"),
    quantiles("Mean time between a request's tokens", "request_time_per_output_token_seconds"),
    quantiles("Arrival to end", "e2e_request_latency_seconds"),
    heatmap("Prompt tokens", "request_prompt_tokens"),
    heatmap("Tokens generated", "request_generation_tokens"),
    heatmap("max_tokens asked for", "request_params_max_tokens"),
    Panel(
        title="Means",
        shows={
            "prompt tokens": mean("request_prompt_tokens"),
            "computed of these": mean("request_prefill_kv_computed_tokens"),
            "tokens generated": mean("request_generation_tokens"),
            "longest sample": mean("request_max_num_generation_tokens"),
            "n": mean("request_params_n"),
        },
    ),
    Panel(title="Clients that left / s", shows={"{{phase}}": rate("request_aborts", "phase")}, unit="reqps"),
    Panel(
        title="Requests admitted and ended / s",
        shows={"admitted": rate("requests"), "ended": rate("request_success")},
        unit="reqps",
    ),
    Panel(title="HTTP answers / s, by route", shows={"{{route}}": rate("http_requests", "route")}, unit="reqps"),
    Panel(
        title="Lines of batches / s", shows={"{{outcome}}": rate("batch_lines", "outcome")}, unit="reqps", stacked=True
    ),
    Panel(title="Calls / s, by key", shows={"{{key}}": rate("key_requests", "key")}, unit="reqps"),
    Panel(title="Tokens / s, by key", shows={"{{key}}, {{kind}}": rate("key_tokens", "key", "kind")}),
    Panel(
        title="Prompt tokens / s, by where they came from",
        shows={"{{source}}": rate("prompt_tokens_by_source", "source")},
        stacked=True,
    ),
    Panel(
        title="Prompt tokens found in a cache / s",
        shows={
            "all": rate("prompt_tokens_cached"),
            "{{source}}": rate("prompt_tokens_cached_by_source", "source"),
        },
    ),
]

BY_WORKER, WORKER = ("instance", "engine"), "{{instance}} {{engine}}"
WORKERS = [
    Panel(title="Up", shows={WORKER: gauge("engine_up", *BY_WORKER)}, most=1),
    Panel(title="Asleep or awake", shows={"{{sleep_state}}": gauge("engine_sleep_state", "sleep_state")}, stacked=True),
    Panel(title="Restarts / s", shows={WORKER: rate("worker_restarts", *BY_WORKER)}),
    Panel(
        title="Since the last step",
        shows={WORKER: f"time() - {gauge('engine_heartbeat_timestamp_seconds', *BY_WORKER, of='max')}"},
        unit="s",
        text="Of an idle worker it grows; of one that has work it must not",
    ),
    Panel(title="Requests running", shows={WORKER: gauge("num_requests_running", *BY_WORKER)}),
    Panel(
        title="Requests waiting",
        shows={WORKER + " {{reason}}": gauge("num_requests_waiting_by_reason", *BY_WORKER, "reason")},
    ),
    Panel(
        title="KV cache in use",
        shows={WORKER: gauge("kv_cache_usage_perc", *BY_WORKER)},
        unit="percentunit",
        most=1,
    ),
    Panel(title="Steps / s", shows={WORKER: events("engine_step_seconds", *BY_WORKER)}),
    Panel(title="Step, p99", shows={WORKER: quantile(0.99, "engine_step_seconds", *BY_WORKER)}, unit="s"),
    Panel(
        title="Busy",
        shows={WORKER: rate("engine_step_part_seconds", *BY_WORKER)},
        unit="percentunit",
        most=1,
        text="Share of the time that it computes",
    ),
    Panel(title="Requests in a step", shows={WORKER: mean("batch_size", *BY_WORKER)}),
    Panel(title="Tokens in a step", shows={WORKER: mean("batch_tokens", *BY_WORKER)}),
    Panel(title="Preemptions / s", shows={WORKER: rate("num_preemptions", *BY_WORKER)}),
    Panel(
        title="Prefix cache hits",
        shows={WORKER: share(rate("prefix_cache_hits", *BY_WORKER), rate("prefix_cache_queries", *BY_WORKER))},
        unit="percentunit",
        most=1,
    ),
    Panel(
        title="KV cache, in blocks",
        shows={
            WORKER + ": {{num_gpu_blocks}} of {{block_size}}": gauge(
                "cache_config_info", *BY_WORKER, "num_gpu_blocks", "block_size"
            )
        },
        most=1,
    ),
]  # fmt: skip


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def dashboard(name: str, title: str, panels: list[Panel]) -> dict[str, Any]:
    info = known("build_info", "gauge")
    return {
        "uid": f"gpt2-server-{name}",
        "title": f"gpt2-server: {title}",
        "tags": ["gpt2-server"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "links": [
            {
                "type": "dashboards",
                "title": "gpt2-server",
                "tags": ["gpt2-server"],
                "asDropdown": False,
                "icon": "external link",
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "tooltip": "",
                "url": "",
            }
        ],
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("job", f"label_values({info}, job)"),
                _variable("model_name", f'label_values({info}{{job=~"$job"}}, model_name)'),
                _variable("instance", f'label_values({info}{{job=~"$job"}}, instance)'),
            ]
        },
        "panels": list(placed(panels)),
    }


ALL = [
    dashboard("overview", "overview", OVERVIEW),
    dashboard("engine", "engine", ENGINE),
    dashboard("requests", "requests", REQUESTS),
    dashboard("workers", "workers", WORKERS),
]


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCKER / "grafana" / "dashboards"
    for each in ALL:
        name = each["uid"].removeprefix("gpt2-server-")
        (directory / f"{name}.json").write_text(json.dumps(each, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
