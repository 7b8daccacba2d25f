"""Parameters that other servers know and this one does not honour yet, each with the values that ask for nothing.

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
    "lora_request": (),
    # llama.cpp
    "mirostat": (0,),
    "dynatemp_range": (0.0,),
    "top_n_sigma": (-1.0,),
    "tfs_z": (1.0,),
    "repeat_penalty": (1.0,),
    "samplers": (),
    "lora": ([],),
    "n_predict": (),
    "n_probs": (0,),
    "t_max_predict_ms": (0,),
    # transformers and text-generation-inference
    "max_new_tokens": (),
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "adapter_id": (),
    # the chat API's
    "messages": (),
    "max_completion_tokens": (),
    "top_logprobs": (),
    "tools": ([],),
    "functions": ([],),
}
# They only shape one of the above: without it they ask for nothing, whatever they hold.
DEPENDENT = {
    "mirostat_tau", "mirostat_eta", "dynatemp_exponent", "repeat_last_n", "tool_choice", "function_call",
}  # fmt: skip
KNOWN = frozenset(UNSUPPORTED) | DEPENDENT


def refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for the first parameter that asks for what the server cannot do."""
    for name, idle in UNSUPPORTED.items():
        value = fields.get(name)
        if value is not None and value not in idle:
            raise refusal(name)


def refusal(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{name}' is not supported by this server. Leave it out, or set it to null.", name, "unsupported_parameter"
    )
