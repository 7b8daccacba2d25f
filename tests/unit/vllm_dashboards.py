"""What the dashboards that vLLM publishes ask for: names of series, and the labels they are chosen or grouped by.

Read on 2026-11-28 from examples/observability/dashboards/grafana of its repository. All choose by `job`, `model_name`
and `instance` too; those in BY_ENGINE by `engine`.
"""

from __future__ import annotations

# metric: the labels beside these
BY_ENGINE: dict[str, dict[str, tuple[str, ...]]] = {
    # vllm_instances, vllm_kv_cache, vllm_speculative_decoding, and what overview and service_status ask for as well
    "num_requests_running": {},
    "num_requests_waiting": {},
    "num_requests_waiting_by_reason": {"reason": ("capacity", "deferred")},
    "kv_cache_usage_perc": {},
    "num_preemptions_total": {},
    "prefix_cache_hits_total": {},
    "prefix_cache_queries_total": {},
    "request_success_total": {"finished_reason": ("stop", "length", "abort", "error")},
    "prompt_tokens_total": {},
    "prompt_tokens_cached_total": {},
    "prompt_tokens_by_source_total": {"source": ("local_compute", "local_cache_hit", "external_kv_transfer")},
    "prompt_tokens_cached_by_source_total": {"source": ("device",)},
    "generation_tokens_total": {},
    "time_to_first_token_seconds": {},
    "inter_token_latency_seconds": {},
    "e2e_request_latency_seconds": {},
    "request_time_per_output_token_seconds": {},
    "request_queue_time_seconds": {},
    "request_prefill_time_seconds": {},
    "request_decode_time_seconds": {},
    "request_inference_time_seconds": {},
    "request_prompt_tokens": {},
    "request_generation_tokens": {},
    "request_prefill_kv_computed_tokens": {},
    "request_max_num_generation_tokens": {},
    "request_params_n": {},
    "request_params_max_tokens": {},
    "engine_sleep_state": {"sleep_state": ("awake", "discard_all")},
    "cache_config_info": {"num_gpu_blocks": (), "block_size": ()},
    "spec_decode_num_drafts_total": {},
    "spec_decode_num_draft_tokens_total": {},
    "spec_decode_num_accepted_tokens_total": {},
    "spec_decode_num_accepted_tokens_per_pos_total": {"position": ()},
}
BOUNDS = {  # of buckets, that a dashboard lets one choose as an objective
    "time_to_first_token_seconds": ("0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "10.0"),
    "request_time_per_output_token_seconds": ("0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5"),
}
PROCESS = (
    "process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds",
    "process_start_time_seconds",
)  # fmt: skip

# metric: why it is not here
ABSENT = {
    "iteration_tokens_total": "a histogram with a counter's name, which promtool refuses: gpt2_batch_tokens",
    "http_requests_total": "of vLLM's web framework, without its prefix: gpt2_http_requests_total",
    "http_request_duration_seconds": "of vLLM's web framework; times of requests are e2e_request_latency_seconds",
    "external_prefix_cache_hits_total": "no cache outside the server",
    "external_prefix_cache_queries_total": "no cache outside the server",
    "mm_cache_hits_total": "GPT-2 reads text alone",
    "mm_cache_queries_total": "GPT-2 reads text alone",
    "lora_requests_info": "adapters are models of their own here, told by /v1/models",
    "kv_block_lifetime_seconds": "vLLM has it with --kv-cache-metrics alone",
    "kv_block_idle_before_evict_seconds": "vLLM has it with --kv-cache-metrics alone",
    "kv_block_reuse_gap_seconds": "vLLM has it with --kv-cache-metrics alone",
    "num_requests_kv_fetch_by_stage": "KV blocks come from no other server",
    "nixl_xfer_time_seconds": "KV blocks come from no other server",
    "nixl_bytes_transferred": "KV blocks come from no other server",
    "nixl_num_failed_transfers_total": "KV blocks come from no other server",
    "nixl_num_failed_notifications_total": "KV blocks come from no other server",
    "nixl_num_kv_expired_reqs_total": "KV blocks come from no other server",
    "nixl_num_notifications_after_expiry_total": "KV blocks come from no other server",
    "kv_offload_load_bytes_total": "KV blocks stay where they were computed",
    "kv_offload_store_bytes_total": "KV blocks stay where they were computed",
    "kv_offload_load_time_total": "KV blocks stay where they were computed",
    "kv_offload_store_time_total": "KV blocks stay where they were computed",
    "kv_offload_load_size": "KV blocks stay where they were computed",
    "kv_offload_store_size": "KV blocks stay where they were computed",
    "kv_offload_lookup_sync_delay_seconds": "KV blocks stay where they were computed",
    "kv_offload_lookup_async_delay_seconds": "KV blocks stay where they were computed",
    "kv_offload_cpu_cache_usage_perc": "KV blocks stay where they were computed",
    "kv_offload_cpu_cache_write_usage_perc": "KV blocks stay where they were computed",
    "kv_offload_cpu_cache_read_usage_perc": "KV blocks stay where they were computed",
    "kv_offload_allocation_failure_total": "KV blocks stay where they were computed",
    "kv_offload_stores_skipped_total": "KV blocks stay where they were computed",
    "simple_kv_offload_save_outcomes_total": "KV blocks stay where they were computed",
    "simple_kv_offload_load_blocks_total": "KV blocks stay where they were computed",
    "simple_kv_offload_used_blocks": "KV blocks stay where they were computed",
    "simple_kv_offload_pending_store_blocks": "KV blocks stay where they were computed",
    "sleep_mode_operation_duration_seconds": "calls of /sleep and /wake_up are in gpt2_http_requests_total",
    "rl_weight_update_operation_duration_seconds": "weights are not changed while they are served",
    "estimated_flops_per_gpu_total": "vLLM has it with --enable-mfu-metrics alone",
    "estimated_read_bytes_per_gpu_total": "vLLM has it with --enable-mfu-metrics alone",
    "estimated_write_bytes_per_gpu_total": "vLLM has it with --enable-mfu-metrics alone",
}
