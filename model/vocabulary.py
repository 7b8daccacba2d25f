"""Which tokens of a vocabulary end a text, and which begin one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from model.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class Ends:
    ids: tuple[int, ...]  # the tokens that end a text, the tokenizer's own first; perhaps none
    words: tuple[int, ...]  # that the checkpoint names as ends, and that are ordinary words
    start: int | None  # what stands in place of an empty text


def decide_ends(
    named: Mapping[str, str],
    ids: Mapping[str, int],
    special_ids: Set[int],
    vocab_size: int,
    declared: Sequence[int],
    *,
    forced: bool,
) -> Ends:
    """The tokenizer's eos, and of the `declared` those that are special tokens; where `forced`, these and no others.

    named: texts of the roles of special tokens. ids: of these texts at least. Raises TokenizerError.
    """
    known = {role: ids[text] for role, text in named.items() if ids.get(text, vocab_size) < vocab_size}
    eos, bos = known.get("eos_token"), known.get("bos_token")
    if forced:
        ends: tuple[int, ...] = tuple(dict.fromkeys(declared))
        if not all(0 <= id_ < vocab_size for id_ in ends):
            raise TokenizerError(f"an end-of-text token is none of the model's {vocab_size} tokens")
    else:
        own = () if eos is None else (eos,)
        ends = tuple(dict.fromkeys([*own, *(id_ for id_ in declared if id_ in special_ids and id_ < vocab_size)]))
    words = tuple(id_ for id_ in dict.fromkeys(declared) if id_ not in ends)
    return Ends(ends, words, bos if bos is not None else next(iter(ends), None))


def embeds_all(ids: Iterable[int], vocab_size: int) -> None:
    """ids: of a vocabulary without the tokens that were added to it. Raises TokenizerError."""
    largest = max(ids, default=-1)
    if largest >= vocab_size:
        raise TokenizerError(f"the vocabulary has token {largest}, the model's {vocab_size} embeddings do not")
