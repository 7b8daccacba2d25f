"""What one request may ask for. A slice of the settings, handed to whoever reads requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_model_len: int  # tokens of prompt and completion together
    vocab_size: int
    clamp_max_tokens: bool = False  # to what the prompt leaves of the context, instead of an error
    max_choices: int = 128  # n
    max_best_of: int = 20
    max_prompts: int = 128
    max_sequences: int = 128  # prompts x max(n, best_of)
    max_stop_strings: int = 16
    max_stop_length: int = 256  # characters
    max_logprobs: int = 20
    max_logit_bias: int = 1024  # entries
    max_bad_words: int = 128  # each as long as a stop string may be
    max_breakers: int = 16  # of dry
    max_breaker_length: int = 40  # bytes
    max_body_bytes: int = 1 << 20
    body_timeout: float = 30.0  # seconds from the first look at a body to its last byte
