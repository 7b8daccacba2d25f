"""What one row of logits is decided by, beside the logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.request_tables import RequestTables
from model.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    tables: RequestTables  # of the request; with the params
    uniform: float  # in [0, 1); picks the token
    prompt: Tensor  # (n,) int64, on the logits' device; read for repetition_penalty and dry alone
    output: Tensor  # (m,) int64, the tokens generated so far
    coin: float  # in [0, 1), independent of `uniform`; says whether xtc acts
    allowed: Tensor | None  # (vocab,) bool: what the row's grammar allows next

    @property
    def params(self) -> SamplingParams:
        return self.tables.params
