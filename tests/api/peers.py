"""What other servers publish that a completion request may hold: the names of its fields, nothing else.

Read on 2026-11-28 from the sources named. A peer that has changed since is read again, and its date with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peer:
    date: str  # of the version that was read
    source: str
    fields: frozenset[str]


def _peer(date: str, source: str, fields: str) -> Peer:
    return Peer(date, source, frozenset(fields.split()))


PEERS = {
    "vllm": _peer(
        "2026-11", "vllm/entrypoints/openai/completion/protocol.py",
        """model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
        stream_options suffix temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking
        length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
        spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs
        logprob_token_ids bad_words prompt_embeds add_special_tokens response_format structured_outputs priority
        request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
        return_token_offsets return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
        repetition_detection thinking_token_budget stream_interval""",
    ),
    "vllm before 0.12": _peer(
        "2025", "vllm/entrypoints/openai/protocol.py",
        """best_of early_stopping guided_json guided_regex guided_choice guided_grammar guided_decoding_backend
        guided_whitespace_pattern structural_tag logits_processors""",
    ),
    "sglang": _peer(
        "2026-11", "python/sglang/srt/entrypoints/openai/protocol.py",
        """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
        stream stream_options suffix temperature top_p user return_hidden_states return_routed_experts
        routed_experts_start_len return_cached_tokens_details return_token_ids top_k min_p min_tokens json_schema
        regex ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos skip_special_tokens lora_path
        session_id session_params response_format custom_params custom_logit_processor images_config bootstrap_host
        bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank data_parallel_rank rid extra_key
        cache_salt ngram_corpus_id priority custom_labels min_new_tokens""",
    ),
    "text-generation-webui": _peer(
        "2026-05-03", "modules/api/typing.py",
        """preset dynatemp_low dynatemp_high dynatemp_exponent smoothing_factor smoothing_curve min_p top_k typical_p
        xtc_threshold xtc_probability epsilon_cutoff eta_cutoff tfs top_a top_n_sigma adaptive_target adaptive_decay
        dry_multiplier dry_allowed_length dry_base repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
        repetition_penalty_range penalty_alpha guidance_scale mirostat_mode mirostat_tau mirostat_eta
        prompt_lookup_num_tokens max_tokens_second do_sample dynamic_temperature temperature_last auto_max_new_tokens
        ban_eos_token add_bos_token enable_thinking reasoning_effort preserve_thinking skip_special_tokens
        static_cache truncation_length seed sampler_priority custom_token_bans negative_prompt dry_sequence_breakers
        grammar_string model prompt messages best_of echo frequency_penalty logit_bias logprobs max_tokens n
        presence_penalty stop stream stream_options suffix temperature top_p user""",
    ),
    "llama.cpp": _peer(
        "2026-11", "tools/server/server-schema.cpp",
        """verbose timings_per_token stream stream_options cache_prompt return_tokens return_progress
        sse_ping_interval n_predict max_completion_tokens max_tokens n_indent n_keep n_discard n_cmpl n n_cache_reuse
        t_max_predict_ms t_max_prompt_ms response_fields top_k top_p min_p top_n_sigma xtc_probability xtc_threshold
        typical_p typ_p temperature dynatemp_range dynatemp_exponent repeat_last_n repeat_penalty frequency_penalty
        presence_penalty dry_multiplier dry_base dry_allowed_length dry_penalty_last_n mirostat mirostat_tau
        mirostat_eta adaptive_target adaptive_decay seed n_probs logprobs min_keep backend_sampling
        post_sampling_probs lora dry_sequence_breakers json_schema grammar grammar_type grammar_lazy chat_format
        reasoning_format generation_prompt parse_tool_calls chat_parser continue_final_message echo preserved_tokens
        grammar_triggers reasoning_control reasoning_budget_tokens reasoning_budget_start_tag
        reasoning_budget_end_tags reasoning_budget_end_tag reasoning_budget_message logit_bias ignore_eos stop
        samplers prompt id_slot multimodal_data""",
    ),
    "text-generation-inference": _peer(
        "2026-01-08", "router/src/lib.rs",
        """model prompt max_tokens temperature top_p stream seed suffix repetition_penalty frequency_penalty stop
        best_of top_k typical_p do_sample max_new_tokens return_full_text truncate watermark details
        decoder_input_details top_n_tokens grammar adapter_id""",
    ),
    "koboldai": _peer(
        "2026-07-21", "koboldcpp_api.json, and what its page sends",
        """max_context_length max_length prompt rep_pen rep_pen_range rep_pen_slope sampler_order sampler_seed
        stop_sequence temperature tfs top_a top_k top_p min_p typical use_default_badwordsids dynatemp_range
        smoothing_factor smoothing_curve dynatemp_exponent mirostat mirostat_tau mirostat_eta genkey grammar
        grammar_retain_state memory images audio trim_stop render_special bypass_eos banned_tokens logit_bias
        dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold
        xtc_probability nsigma adaptive_target adaptive_decay guidance_scale negative_prompt
        replace_instruct_placeholders reasoning_effort presence_penalty""",
    ),
    "lm studio": _peer(
        "2025", "its documentation, which was not at hand on that day: as its clients send them",
        """model prompt top_p top_k temperature max_tokens stream stop presence_penalty frequency_penalty logit_bias
        repeat_penalty seed ttl draft_model""",
    ),
    "ollama": _peer(
        "2026-08-21", "openai/openai.go",
        """model prompt frequency_penalty max_tokens presence_penalty seed stop stream stream_options temperature
        top_p suffix logprobs _debug_render_only""",
    ),
}  # fmt: skip
