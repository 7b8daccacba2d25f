"""What one row of logits is decided by, beside the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.request_tables import RequestTables
from model.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    tables: RequestTables  # of the request; with the params
    uniform: float  # in [0, 1); picks the token
    coin: float  # in [0, 1), independent of `uniform`; says whether xtc acts
    known: npt.NDArray[np.int64]  # the prompt's tokens and those generated so far, one after the other in memory
    prompt_length: int
    grammar: npt.NDArray[np.uint32] | None  # what the row's grammar allows next: bit i of word w is token 32 w + i

    @property
    def params(self) -> SamplingParams:
        return self.tables.params

    @property
    def output(self) -> npt.NDArray[np.int64]:
        return self.known[self.prompt_length :]
