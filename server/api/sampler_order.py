"""Orders of samplers, as llama.cpp, text-generation-webui and KoboldAI ask for them.

Here the temperature comes first or last, and min_p before or after top_p; the rest is fixed (model/picking.py). An
order that comes to the same, for the samplers that a request switches on, is honoured; any other is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from server.api.schemas import CompletionBody
from server.errors import InvalidRequest


class Stage(IntEnum):
    """In our order."""

    PENALTIES = 0
    TEMPERATURE = 1
    MIN_P = 2
    TOP_K = 3
    TOP_P = 4
    TYPICAL = 5
    XTC = 6


ORDERS = ("samplers", "sampler_priority", "sampler_order")
STAGES: dict[str, tuple[Stage, ...]] = {
    "penalties": (Stage.PENALTIES,),
    "repetition_penalty": (Stage.PENALTIES,),
    "presence_penalty": (Stage.PENALTIES,),
    "frequency_penalty": (Stage.PENALTIES,),
    "dry": (Stage.PENALTIES,),
    "temperature": (Stage.TEMPERATURE,),
    "temp": (Stage.TEMPERATURE,),
    "min_p": (Stage.MIN_P,),
    "top_k": (Stage.TOP_K,),
    "top_p": (Stage.TOP_P,),
    "top_p_top_k": (Stage.TOP_K, Stage.TOP_P),
    "typical_p": (Stage.TYPICAL,),
    "typ_p": (Stage.TYPICAL,),
    "xtc": (Stage.XTC,),
}  # samplers of other names are off, or their own parameters were refused
LETTERS = {
    "e": "penalties",
    "d": "dry",
    "k": "top_k",
    "y": "typ_p",
    "p": "top_p",
    "m": "min_p",
    "x": "xtc",
    "t": "temp",
}
NUMBERS = {0: "top_k", 2: "top_p", 4: "typ_p", 5: "temp", 6: "penalties"}  # KoboldAI's


@dataclass(frozen=True, slots=True)
class SamplerOrder:
    temperature_last: bool
    min_p_last: bool = False


def read_order(fields: Mapping[str, Any], body: CompletionBody) -> SamplerOrder:
    """Raises InvalidRequest for an order that cannot be had."""
    order = SamplerOrder(body.temperature_last)
    if body.temperature == 0:  # the most likely token is the same in any order
        return order
    for name in ORDERS:
        if fields.get(name):
            stages = _active_stages(name, fields[name], body)
            order = SamplerOrder(
                _temperature_is_last(name, stages, moved=body.temperature_last), _min_p_is_last(name, stages)
            )
    return order


def _min_p_is_last(name: str, stages: list[Stage]) -> bool:
    """Whether it comes after top_p. The others have to stand as here."""
    others = [stage for stage in stages if stage not in (Stage.MIN_P, Stage.TEMPERATURE)]
    before = stages[: stages.index(Stage.MIN_P)] if Stage.MIN_P in stages else []
    if others != sorted(others) or {Stage.TYPICAL, Stage.XTC} & set(before):
        raise _refusal(name)
    return Stage.TOP_P in before


def _temperature_is_last(name: str, stages: list[Stage], *, moved: bool) -> bool:
    """Whether it comes after the filters. moved: whatever the order says. top_k looks at ranks alone, and does the
    same on either side of it."""
    filters = [stage for stage in stages if stage > Stage.TEMPERATURE and stage is not Stage.TOP_K]
    if moved or Stage.TEMPERATURE not in stages or not filters:
        return moved
    before = [stage in filters for stage in stages[: stages.index(Stage.TEMPERATURE)]].count(True)
    if before not in (0, len(filters)):
        raise _refusal(name)
    return before > 0


def _active_stages(name: str, value: Any, body: CompletionBody) -> list[Stage]:
    """Those of the order that are on. Raises InvalidRequest where one that is on is missing."""
    on = _switched_on(body)
    stages: list[Stage] = []
    for each in _names(name, value):
        stages += (stage for stage in STAGES.get(each, ()) if stage in on and stage not in stages)
    if name == "sampler_order":  # KoboldCpp has no number for these: min_p comes with top_p, xtc last
        after_top_p = stages.index(Stage.TOP_P) + 1 if Stage.TOP_P in stages else 0
        stages[after_top_p:after_top_p] = on & {Stage.MIN_P}
        stages += on & {Stage.XTC}
    if name == "samplers" and set(stages) != on:  # what llama.cpp's order leaves out is off
        raise _refusal(name)
    return stages


def _names(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [LETTERS.get(letter, "") for letter in value] if name == "samplers" else value.replace(",", "\n").split()
    if isinstance(value, list) and all(isinstance(each, str | int) for each in value):
        return [each if isinstance(each, str) else NUMBERS.get(each, "") for each in value]
    raise InvalidRequest(f"Invalid type for '{name}': expected an array of samplers.", name, "invalid_type")


def _switched_on(body: CompletionBody) -> set[Stage]:
    on = {
        Stage.PENALTIES: body.repetition_penalty != 1
        or body.presence_penalty != 0
        or body.frequency_penalty != 0
        or body.dry_multiplier > 0,
        Stage.TEMPERATURE: body.temperature != 1,
        Stage.MIN_P: body.min_p > 0,
        Stage.TOP_K: body.top_k > 0,
        Stage.TOP_P: body.top_p < 1,
        Stage.TYPICAL: body.typical_p < 1,
        Stage.XTC: body.xtc_probability > 0,
    }
    return {stage for stage, is_on in on.items() if is_on}


def _refusal(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{name}' asks for an order of samplers that this server does not have: penalties, temperature (or last), "
        "min_p (or after top_p), top_k, top_p, typical_p, xtc.",
        name,
        "unsupported_parameter",
    )
