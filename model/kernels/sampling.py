"""The sampler of the C kernels: what a request and a row ask for, as the structs of kernels.h.

model/logits.py and model/picking.py define what it computes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.dry import LOG_FLOAT_MAX, DryParams
from model.kernels import structs
from model.kernels.library import Kernels
from model.request_tables import RequestTables
from model.sampling_row import SamplingRow

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Request:
    """One request's struct, and the arrays it points into."""

    struct: structs.Sampling
    arrays: tuple[Array, ...]


class Sampler:
    """Picks the tokens of a step's rows."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._requests: WeakKeyDictionary[RequestTables, Request] = WeakKeyDictionary()

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
        """As `model.sampling.choose`."""
        logits = structs.ready(logits)
        tokens = torch.empty(len(rows), dtype=torch.int64)
        own = (structs.SampleRow * len(rows))(*[self._row(row) for row in rows])
        longest = max(len(row.known) for row in rows)
        call = structs.SampleCall(logits.data_ptr(), logits.shape[1], own, longest, tokens.data_ptr())
        self._kernels.run_one(structs.Op.SAMPLE, call, structs.BatchStruct(rows=len(rows)))
        return [None if token < 0 else token for token in tokens.tolist()]

    def _row(self, row: SamplingRow) -> structs.SampleRow:
        request = self._requests.get(row.tables)
        if request is None:
            request = self._requests[row.tables] = make_request(row.tables)
        return structs.SampleRow(
            ctypes.pointer(request.struct),
            row.known.ctypes.data,
            row.prompt_length,
            len(row.known),
            None if row.grammar is None else row.grammar.ctypes.data,
            row.uniform,
            row.coin,
        )


def make_request(tables: RequestTables) -> Request:
    params, dry, breakers = tables.params, tables.params.dry or DryParams(multiplier=0.0), tables.breakers
    runs = [run for each in tables.bad_runs.values() for run in each]
    arrays: dict[str, Array | None] = {
        "allowed": tables.allowed,
        "bias_ids": tables.bias_ids,
        "bias": tables.bias_values,
        "end_ids": tables.ends,
        "ban_ids": tables.bad_ids,
        "run_tokens": np.array([token for run in runs for token in run], dtype=np.int32),
        "run_starts": np.cumsum([0, *map(len, runs)], dtype=np.int32),
    }
    if breakers is not None:
        arrays |= {
            "head_starts": breakers.head_starts,
            "tails": breakers.tails,
            "tail_starts": breakers.tail_starts,
            "tail_tokens": breakers.tail_tokens,
        }
    struct = structs.Sampling(
        top_p=params.top_p,
        typical_p=params.typical_p,
        xtc_probability=params.xtc_probability,
        xtc_threshold=params.xtc_threshold,
        dry_multiplier=dry.multiplier,
        dry_base=dry.base,
        top_k=params.top_k or 0,
        min_tokens=params.min_tokens,
        penalty_range=params.repetition_penalty_range or 0,
        dry_allowed_length=dry.allowed_length,
        dry_last_n=-1 if dry.last_n is None else dry.last_n,
        dry_most=_largest_exponent(dry.base),
        biases=_length(tables.bias_ids),
        ends=_length(tables.ends),
        bans=_length(tables.bad_ids),
        runs=len(runs),
        temperature=params.temperature,
        min_p=params.min_p,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        repetition=params.repetition_penalty,
        greedy=params.greedy,
        min_p_last=params.min_p_last,
        temperature_last=params.temperature_last,
        adjusts=_adjusts(tables),
        **{name: None if array is None else array.ctypes.data for name, array in arrays.items()},
    )
    return Request(struct, tuple(array for array in arrays.values() if array is not None))


def _length(array: Array | None) -> int:
    return 0 if array is None else len(array)


def _largest_exponent(base: float) -> int:
    """Of dry's base, so that the power is a float32."""
    return int(LOG_FLOAT_MAX / math.log(base)) if base > 1.000001 else 1 << 31


def _adjusts(tables: RequestTables) -> bool:
    """Whether anything but min_tokens and a grammar changes the logits."""
    params = tables.params
    return (
        tables.allowed is not None
        or tables.bias_ids is not None
        or bool(params.bad_words)
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or params.dry is not None
    )
