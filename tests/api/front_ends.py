"""What front ends send when nothing was changed in their settings: names and default values, read on 2026-11-28."""

from __future__ import annotations

from typing import Any

PROMPT = "Once upon a time"

MIKUPAD = {  # 2025-12-27, its OpenAI-compatible endpoint
    "model": "", "prompt": PROMPT, "temperature": 0.7, "repetition_penalty": 1.1, "repetition_penalty_range": 256,
    "penalize_nl": False, "ban_eos_token": False, "presence_penalty": 0, "frequency_penalty": 0, "top_p": 0.95,
    "top_k": 40, "min_p": 0, "max_tokens": 1024, "logprobs": 10, "stream": True,
}  # fmt: skip
MIKUPAD_ALL_SAMPLERS = {
    **MIKUPAD, "dynatemp_range": 0, "dynatemp_exponent": 1, "typical_p": 1, "tfs": 1, "xtc_threshold": 0.1,
    "xtc_probability": 0, "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": 1024,
    "dry_sequence_breakers": '["\\n", ":", "\\"", "*"]', "banned_tokens": [],
}  # fmt: skip

KOBOLDAI_LITE = {  # 2026-07-21, a custom OpenAI endpoint
    "max_tokens": 768, "model": "", "temperature": 0.75, "top_p": 0.92, "presence_penalty": 0.050000000000000044,
    "prompt": PROMPT, "stream": True,
}  # fmt: skip
KOBOLDAI_LITE_ON_THIS_MACHINE = {**KOBOLDAI_LITE, "max_tokens": 1536}
KOBOLDAI_LITE_NON_STANDARD = {  # with the box ticked that sends fields of its own
    **KOBOLDAI_LITE, "n": 1, "max_context_length": 6144, "max_length": 768, "rep_pen": 1.05, "top_k": 100, "top_a": 0,
    "typical": 1, "tfs": 1, "rep_pen_range": 360, "rep_pen_slope": 0.7, "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "logit_bias": {},
}  # fmt: skip

_OOBA_ORDER = [
    "repetition_penalty", "presence_penalty", "frequency_penalty", "dry", "temperature", "dynamic_temperature",
    "quadratic_sampling", "top_n_sigma", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "tfs", "top_a",
    "min_p", "adaptive_p", "mirostat", "xtc", "encoder_repetition_penalty", "no_repeat_ngram",
]  # fmt: skip
TEXT_GENERATION_WEBUI = {  # 2026-05-03: its schema with every default written out
    "prompt": PROMPT, "dynatemp_low": 1, "dynatemp_high": 1, "dynatemp_exponent": 1, "smoothing_factor": 0,
    "smoothing_curve": 1, "min_p": 0, "top_k": 0, "typical_p": 1, "xtc_threshold": 0.1, "xtc_probability": 0,
    "epsilon_cutoff": 0, "eta_cutoff": 0, "tfs": 1, "top_a": 0, "top_n_sigma": 0, "adaptive_target": 0,
    "adaptive_decay": 0.9, "dry_multiplier": 0, "dry_allowed_length": 2, "dry_base": 1.75, "repetition_penalty": 1,
    "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "repetition_penalty_range": 1024, "penalty_alpha": 0,
    "guidance_scale": 1, "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1, "prompt_lookup_num_tokens": 0,
    "max_tokens_second": 0, "do_sample": True, "dynamic_temperature": False, "temperature_last": False,
    "auto_max_new_tokens": False, "ban_eos_token": False, "add_bos_token": True, "enable_thinking": True,
    "reasoning_effort": "medium", "preserve_thinking": False, "skip_special_tokens": True, "static_cache": False,
    "truncation_length": 0, "seed": -1, "sampler_priority": "\n".join(_OOBA_ORDER), "custom_token_bans": "",
    "negative_prompt": "", "dry_sequence_breakers": '"\\n", ":", "\\"", "*"', "grammar_string": "", "best_of": 1,
    "echo": False, "frequency_penalty": 0, "max_tokens": 512, "n": 1, "presence_penalty": 0, "stream": False,
    "temperature": 1, "top_p": 1,
}  # fmt: skip

LLAMA_CPP_CHAT = {  # its page: first what it always sends, then the server's defaults as its settings show them
    "messages": [{"role": "user", "content": "hi"}], "stream": True, "return_progress": True,
    "reasoning_format": "auto", "timings_per_token": True, "max_tokens": -1,
}  # fmt: skip
LLAMA_CPP_CHAT_WITH_ALL_SETTINGS = {
    **LLAMA_CPP_CHAT, "temperature": 0.8, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95,
    "min_p": 0.05, "xtc_probability": 0, "xtc_threshold": 0.1, "typ_p": 1, "repeat_last_n": 64, "repeat_penalty": 1,
    "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2,
    "dry_penalty_last_n": -1, "samplers": ["top_k", "typ_p", "top_p", "min_p", "temperature"],
    "backend_sampling": False,
}  # fmt: skip
LLAMA_CPP_SIMPLE_CHAT = {  # its smaller page, on the completions route
    "temperature": 0.7, "max_tokens": 2048, "n_predict": 2048, "cache_prompt": True, "prompt": PROMPT, "stream": True,
}  # fmt: skip

_SILLY_TAVERN = {  # 2026: what it sends to all text completion backends that do not choose among its fields
    "prompt": PROMPT, "model": "", "max_new_tokens": 350, "max_tokens": 350, "temperature": 0.7, "top_p": 0.5,
    "typical_p": 1, "typical": 1, "min_p": 0, "repetition_penalty": 1.2, "frequency_penalty": 0, "presence_penalty": 0,
    "top_k": 40, "skew": 0, "min_tokens": 0, "add_bos_token": True, "smoothing_factor": 0, "smoothing_curve": 1,
    "dry_allowed_length": 2, "dry_multiplier": 0, "dry_base": 1.75, "dry_penalty_last_n": 0,
    "dry_sequence_breakers": '["\\n",":","\\"","*"]', "max_tokens_second": 0, "stopping_strings": ["\nYou:"],
    "stop": ["\nYou:"], "truncation_length": 8192, "ban_eos_token": False, "skip_special_tokens": True,
    "include_reasoning": True, "top_a": 0, "tfs": 1, "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1,
    "custom_token_bans": "", "banned_strings": [], "api_type": "x", "api_server": "http://127.0.0.1:8000/",
    "xtc_threshold": 0.1, "xtc_probability": 0, "nsigma": 0, "top_n_sigma": 0, "min_keep": 0, "adaptive_target": -0.01,
    "adaptive_decay": 0.9, "stream": True,
}  # fmt: skip
_NOT_VLLM = {
    "rep_pen": 1.2, "rep_pen_range": 0, "repetition_penalty_range": 0, "guidance_scale": 1, "negative_prompt": "",
    "repeat_penalty": 1.2, "repeat_last_n": 0, "n_predict": 350, "num_predict": 350, "num_ctx": 8192, "mirostat": 0,
    "ignore_eos": False, "rep_pen_slope": 1,
}  # fmt: skip
_OOBA = {
    "min_length": 0, "num_beams": 1, "length_penalty": 1, "early_stopping": False, "sampler_priority": _OOBA_ORDER,
    "epsilon_cutoff": 0, "eta_cutoff": 0, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "penalty_alpha": 0, "temperature_last": True, "do_sample": True,
}  # fmt: skip
_VLLM = {"n": 1, "ignore_eos": False, "spaces_between_special_tokens": True}
_APHRODITE = {
    **_VLLM, "temperature_last": True, "eta_cutoff": 0, "epsilon_cutoff": 0, "early_stopping": False,
    "include_stop_str_in_output": False, "custom_token_bans": [], "no_repeat_ngram_size": 0,
}  # fmt: skip
_VLLM_KEYS = """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
    stream suffix temperature top_p user use_beam_search top_k min_p repetition_penalty length_penalty early_stopping
    stop_token_ids ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
    include_stop_str_in_output response_format guided_json guided_regex guided_choice guided_grammar
    guided_decoding_backend guided_whitespace_pattern"""
_INFERMATIC_KEYS = """model prompt max_tokens temperature top_p top_k repetition_penalty stream stop presence_penalty
    frequency_penalty min_p seed ignore_eos n best_of min_tokens spaces_between_special_tokens skip_special_tokens
    logprobs"""
_TOGETHER_KEYS = """model prompt max_tokens temperature top_p top_k repetition_penalty min_p presence_penalty
    frequency_penalty stream stop"""
_GENERIC_KEYS = """model prompt stream temperature top_p frequency_penalty presence_penalty stop seed logit_bias
    logprobs max_tokens n best_of"""


def _chosen(body: dict[str, Any], keys: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name in keys.split()}


SILLY_TAVERN: dict[str, dict[str, Any]] = {  # those of its backends that speak /v1/completions
    "ooba": {**_SILLY_TAVERN, **_NOT_VLLM, **_OOBA},
    "vllm": _chosen({**_SILLY_TAVERN, **_VLLM}, _VLLM_KEYS),
    "featherless": _chosen({**_SILLY_TAVERN, **_NOT_VLLM}, _VLLM_KEYS),
    "aphrodite": {**_SILLY_TAVERN, **_APHRODITE},
    "tabby": {
        **_SILLY_TAVERN, **_NOT_VLLM, "n": 1, "temperature_last": True, "repetition_decay": 0,
        "speculative_ngram": False,
    },
    "koboldcpp": {
        **_SILLY_TAVERN, **_NOT_VLLM, "sampler_order": [6, 0, 1, 3, 4, 2, 5], "trim_stop": True,
        "dry_sequence_breakers": ["\n", ":", '"', "*"],
    },
    "huggingface": {**_SILLY_TAVERN, **_NOT_VLLM, "seed": 1234567890},
    "infermaticai": _chosen({**_SILLY_TAVERN, **_VLLM}, _INFERMATIC_KEYS),
    "togetherai": _chosen({**_SILLY_TAVERN, **_NOT_VLLM}, _TOGETHER_KEYS),
    "generic": _chosen({**_SILLY_TAVERN, **_NOT_VLLM}, _GENERIC_KEYS),
}  # fmt: skip

GUIDANCE = {  # 2026-04-10, its VLLMModel: one grammar by the names of two versions
    "model": "gpt2", "prompt": PROMPT, "guided_decoding_backend": "guidance", "guided_grammar": 'start: "a" | "b"',
    "structured_outputs": {"grammar": 'start: "a" | "b"'}, "stream": True, "logprobs": 5,
}  # fmt: skip
PROMPTFOO = {  # its openai:completion provider
    "model": "gpt2", "prompt": PROMPT, "seed": None, "max_tokens": 1024, "temperature": 0, "top_p": 1,
    "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip
