"""Parameters that other servers know and this one does not honour, each with the values that ask for nothing; and those
that can change no answer.

A request that holds any other value is refused by name: an answer that quietly ignored it would be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.errors import InvalidRequest

# name: the values that ask for nothing (null always does)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # vLLM
    "best_of_beams": (),
    "guided_decoding_backend": ("auto", "guidance"),
    "structural_tag": (),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "lora_request": (),
    "watermarking": (False,),
    "repetition_detection": (),
    # SGLang
    "stop_regex": ("", []),
    "custom_logit_processor": ("",),
    "custom_params": ({},),
    "session_params": ({},),
    "lora_path": ("", []),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "images_config": ({},),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    # llama.cpp
    "dynatemp_range": (0.0,),
    "tfs_z": (1.0,),
    "lora": ([],),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "n_indent": (0,),
    "return_tokens": (False,),
    "response_fields": ([],),
    "post_sampling_probs": (False,),
    "generation_prompt": ("",),
    "multimodal_data": ([],),
    "_debug_render_only": (False,),  # Ollama
    # transformers and text-generation-inference
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "top_n_tokens": (0,),
    "adapter_id": ("",),
    # text-generation-webui, KoboldAI, SillyTavern
    "preset": ("", "None"),
    "tfs": (1.0,),
    "top_a": (0.0,),
    "skew": (0.0,),
    "smoothing_factor": (0.0,),
    "mirostat_mode": (0,),
    "dynamic_temperature": (False,),
    "dynatemp_mode": (0,),
    "auto_max_new_tokens": (False,),
    "ban_eos_token": (False,),
    "bypass_eos": (False,),
    "use_default_badwordsids": (False,),
    "custom_token_bans": ("", []),
    "banned_tokens": ("", []),
    "banned_strings": ("", []),
    "rep_pen_slope": (1.0,),
    "rep_pen_decay": (0,),
    "repetition_decay": (0,),
    "grammar_retain_state": (False,),
    "memory": ("",),
    "images": ([],),
    "audio": ([],),
    "minimum_message_content_tokens": (0,),
    # the chat API's
    "messages": (),
    "top_logprobs": (),
    "tools": ([],),
    "functions": ([],),
}
# Numbers up to these ask for nothing.
OFF_UP_TO: dict[str, float] = {
    "mirostat": 0, "top_n_sigma": 0, "nsigma": 0, "adaptive_target": 0, "min_keep": 1, "t_max_predict_ms": 0,
    "t_max_prompt_ms": 0, "max_tokens_second": 0,
}  # fmt: skip
# They only shape one of the above: without it they ask for nothing, whatever they hold.
DEPENDENT = frozenset({
    "mirostat_tau", "mirostat_eta", "dynatemp_exponent", "dynatemp_low", "dynatemp_high", "dynatemp_min",
    "dynatemp_max", "smoothing_curve", "adaptive_decay", "negative_prompt", "grammar_type", "preserved_tokens",
    "tool_choice", "function_call",
})  # fmt: skip
# Where, when and how an answer is made, what is said beside it, and what only other kinds of model have: none of it can
# change the choices of an answer.
HARMLESS = frozenset({
    # caching and placement
    "cache_prompt", "n_cache_reuse", "id_slot", "slot_id", "n_keep", "n_discard", "session_id", "extra_key", "genkey",
    "routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank", "ttl", "keep_alive", "static_cache",
    # speculation, and where numbers are computed
    "draft_model", "ngram_corpus_id", "prompt_lookup_num_tokens", "speculative_ngram", "backend_sampling",
    # what is told beside the choices, and in how many pieces
    "timings_per_token", "return_progress", "verbose", "sse_ping_interval", "stream_interval", "details",
    "return_cached_tokens_details", "routed_experts_start_len", "routed_experts_prompt_start", "return_token_offsets",
    "return_mm_kwargs", "custom_labels",
    # thinking and chats
    "thinking_token_budget", "enable_thinking", "preserve_thinking", "reasoning_effort", "include_reasoning",
    "reasoning_format", "reasoning_control", "reasoning_budget_tokens", "reasoning_budget_start_tag",
    "reasoning_budget_end_tag", "reasoning_budget_end_tags", "reasoning_budget_message", "chat_format", "chat_parser",
    "parse_tool_calls", "continue_final_message", "replace_instruct_placeholders",
})  # fmt: skip
REFUSABLE = frozenset(UNSUPPORTED) | frozenset(OFF_UP_TO)
KNOWN = REFUSABLE | DEPENDENT | HARMLESS
CALLS = {"tools": "tool_choice", "functions": "function_call"}


def refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for the first parameter that asks for what the server cannot do."""
    for name in fields:
        if name in REFUSABLE and not _asks_for_nothing(name, fields):
            raise refusal(name)


def _asks_for_nothing(name: str, fields: Mapping[str, Any]) -> bool:
    value = fields[name]
    if name in CALLS and fields.get(CALLS[name]) == "none":
        return True
    if name in OFF_UP_TO:
        return isinstance(value, int | float) and value <= OFF_UP_TO[name]
    return value is None or value in UNSUPPORTED[name]


def refusal(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{name}' is not supported by this server. Leave it out, or set it to null.", name, "unsupported_parameter"
    )
