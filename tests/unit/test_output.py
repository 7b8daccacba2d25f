"""engine/output.py against the plain definition: decode all bytes at once, cut where the first stop is complete."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.byte_level import ByteLevelTokenizer
from model.sampling_params import SamplingParams
from model.step import TokenLogprobs
from server.engine.output import ChoiceOutput, TokenTexts
from server.engine.request import ChoiceDelta, GenerationRequest, Prompt
from server.engine.stops import StopMatcher, automaton
from server.worker.messages import FinishReason

EOS = 256
SPLITS = [b"", b"a", b"ab", "日本".encode()[:4], "👍🏽".encode()[1:6], "é".encode(), b"\xff\xfe", b"stop", b"op"]
TOKENS = {bytes([value]): value for value in range(256)}
TOKENS |= {raw: 257 + i for i, raw in enumerate(SPLITS) if len(raw) > 1}
ENDS = {"<|endoftext|>": EOS, "<|stop|>": 299}
TOKENIZER = ByteLevelTokenizer(TOKENS, ENDS, list(ENDS), 300)
IDS = [*range(256), *[id_ for id_ in TOKENS.values() if id_ > 256]]


def choice(
    *,
    stop: tuple[str, ...] = (),
    prompt: Prompt | None = None,
    keep: bool = False,
    skip_special: bool = True,
    as_ids: bool = False,
    **params: object,
) -> ChoiceOutput:
    request = GenerationRequest(
        id="cmpl-1",
        prompts=[],
        params=SamplingParams(seed=1, **params),  # type: ignore[arg-type]
        stop=stop,
        include_stop_str_in_output=keep,
        skip_special_tokens=skip_special,
        tokens_as_ids=as_ids,
    )
    return ChoiceOutput(request, prompt or Prompt([97], "a"), 0, TOKENIZER, TokenTexts(TOKENIZER))


def run(output: ChoiceOutput, tokens: list[int], bursts: list[int] | None = None, **push: object) -> list[ChoiceDelta]:
    """Push the tokens a few at a time and end by length, unless a stop string ended it before."""
    deltas: list[ChoiceDelta] = []
    bursts = list(bursts or [])
    while tokens:
        size = bursts.pop() if bursts else 1
        batch, tokens = tokens[:size], tokens[size:]
        rows = [TokenLogprobs(-1.0, [(97, -1.0), (98, -2.0), (99, -math.inf)]) for _ in batch]
        deltas.append(output.push(batch, rows, None if tokens else FinishReason.LENGTH, **push))  # type: ignore[arg-type]
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def text_of(deltas: list[ChoiceDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def cut(text: str, stops: tuple[str, ...], *, keep: bool = False) -> tuple[str, str | None]:
    """The definition: the stop string that completes first, ties by their order."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if keep else end - len(stop)], stop
    return text, None


some_ids = st.lists(st.sampled_from(IDS), min_size=1, max_size=40)
some_bursts = st.lists(st.integers(1, 5), max_size=40)
some_stops = st.lists(st.text("abstop日é\ufffd", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)
stoppy_ids = st.lists(st.sampled_from([*b"abstop", *"日é".encode(), *IDS[256:]]), min_size=1, max_size=40)


@given(some_ids, some_bursts)
@example(list("👩‍👩‍👧 e\u0301 天气 العربية".encode()), [])
@example(list(range(256)), [])
@example([0xED, 0xA0, 0x80, 0xF4, 0x90, 0xC0, 0x80], [])
def test_joined_text_is_all_bytes_decoded_at_once(tokens: list[int], bursts: list[int]) -> None:
    deltas = run(choice(), tokens, bursts)
    assert text_of(deltas) == TOKENIZER.decode(tokens)
    assert [id_ for delta in deltas for id_ in delta.token_ids] == tokens
    assert deltas[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("value", range(256))
def test_every_single_byte(value: int) -> None:
    assert text_of(run(choice(), [value])) == bytes([value]).decode(errors="replace")
    assert text_of(run(choice(), [97, value, 98])) == bytes([97, value, 98]).decode(errors="replace")


@given(st.text(max_size=30), some_bursts)
def test_valid_text_never_shows_a_replacement_character(text: str, bursts: list[int]) -> None:
    text = text.replace("\ufffd", "")
    tokens = list(text.encode())
    if tokens:
        deltas = run(choice(), tokens, bursts)
        assert text_of(deltas) == text
        assert not any("\ufffd" in delta.text for delta in deltas)


@given(stoppy_ids, some_bursts, some_stops, st.booleans())
@example(list(b"ab"), [], ("b", "ab"), False)
@example(list(b"ab"), [], ("ab", "b"), False)
@example(list(b"aab"), [], ("aaab", "ab"), False)
@example([*b"x", 0xE6], [], ("\ufffd",), False)
def test_stop_strings_cut_where_the_first_completes(
    tokens: list[int], bursts: list[int], stops: tuple[str, ...], keep: bool
) -> None:
    deltas = run(choice(stop=stops, keep=keep), tokens, bursts)
    text, stop = cut(TOKENIZER.decode(tokens), stops, keep=keep)
    assert text_of(deltas) == text
    assert deltas[-1].stop_reason == stop
    assert deltas[-1].finish_reason is (FinishReason.LENGTH if stop is None else FinishReason.STOP)


@given(st.lists(st.text("abstop", max_size=3), max_size=20), some_stops)
def test_only_what_may_become_a_stop_is_held_back(pieces: list[str], stops: tuple[str, ...]) -> None:
    matcher, seen, shown = StopMatcher(stops, keep=False), "", ""
    for piece in pieces:
        seen += piece
        match = matcher.push(piece)
        shown += match.text
        if match.stop is not None:
            return
        held = max(size for stop in stops for size in range(len(stop)) if seen.endswith(stop[:size]))
        assert shown == seen[: len(seen) - held]
    assert shown + matcher.flush() == seen


@given(stoppy_ids, some_bursts, some_stops, st.integers(0, 10))
def test_min_tokens_is_blind_to_what_completes_before_it(
    tokens: list[int], bursts: list[int], stops: tuple[str, ...], least: int
) -> None:
    deltas = run(choice(stop=stops, min_tokens=least), tokens, bursts)
    assert sum(len(delta.token_ids) for delta in deltas) >= min(least, len(tokens))
    if deltas[-1].finish_reason is FinishReason.LENGTH:
        assert text_of(deltas) == TOKENIZER.decode(tokens)


def test_min_tokens_lets_a_stop_complete_after_it() -> None:
    deltas = run(choice(stop=("ab",), min_tokens=3), list(b"abacab"))
    assert text_of(deltas) == "abac"
    assert text_of(run(choice(stop=("ab",), min_tokens=1), list(b"abc"))) == ""


def test_nothing_after_the_token_that_completes_a_stop() -> None:
    (delta,) = run(choice(stop=("b",), logprobs=0), list(b"abcd"), [4])
    assert delta.token_ids == list(b"ab")
    assert delta.tokens is not None
    assert [row.token for row in delta.tokens] == ["a", "b"]
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", FinishReason.STOP, "b")


def test_held_text_comes_out_at_the_end() -> None:
    deltas = run(choice(stop=("stop!",)), list(b"a stop"))
    assert [delta.text for delta in deltas] == ["a", " ", "", "", "", "stop"]


@pytest.mark.parametrize(("keep", "skip", "text"), [
    (False, True, "a"), (False, False, "a"), (True, True, "a"), (True, False, "a<|endoftext|>"),
])  # fmt: skip
def test_eos_has_a_row_and_shows_text_only_on_demand(keep: bool, skip: bool, text: str) -> None:
    output = choice(logprobs=1, keep=keep, skip_special=skip)
    row = TokenLogprobs(-0.5, [(EOS, -0.5)])
    delta = output.push([97, EOS], [row, row], FinishReason.STOP, EOS)
    assert (delta.text, delta.finish_reason, delta.stop_reason) == (text, FinishReason.STOP, None)
    assert delta.tokens is not None
    assert [(info.token, info.text_offset) for info in delta.tokens] == [("a", 1), ("<|endoftext|>", 2)]


def test_a_stop_token_is_not_shown_and_is_the_reason() -> None:
    assert choice().push([97, 98], None, FinishReason.STOP, 98) == ChoiceDelta(
        0, "a", [97, 98], None, FinishReason.STOP, 98
    )
    assert choice(keep=True).push([97, 98], None, FinishReason.STOP, 98).text == "ab"


@pytest.mark.parametrize("end", ENDS.values())
def test_an_end_of_the_model_s_own_is_no_reason(end: int) -> None:
    assert choice().push([97, end], None, FinishReason.STOP, end) == ChoiceDelta(
        0, "a", [97, end], None, FinishReason.STOP, None
    )


def test_eos_that_was_ignored_leaves_no_text_and_goes_on() -> None:
    assert text_of(run(choice(), [97, EOS, 98])) == "ab"
    assert text_of(run(choice(skip_special=False), [97, EOS, 98])) == "a<|endoftext|>b"


@given(some_ids, some_bursts, st.sampled_from(["", "a", "天气非常好"]))
@example([0xED, 0xA0, 0], [], "")
def test_offsets_count_completed_characters_from_the_start_of_the_prompt(
    tokens: list[int], bursts: list[int], prompt: str
) -> None:
    output = choice(logprobs=0, prompt=Prompt([1], prompt))
    rows = [row for delta in run(output, tokens, bursts) for row in delta.tokens or ()]
    assert len(rows) == len(tokens)
    offsets = [row.text_offset for row in rows]
    assert offsets == sorted(offsets)
    for count, offset in enumerate(offsets):
        # An incomplete tail is not yet a character. Here it is one mark, or two where it is half of a surrogate.
        text = TOKENIZER.decode(tokens[:count])
        assert len(prompt) + len(text) - 2 <= offset <= len(prompt) + len(text)


def test_offsets_of_the_recorded_answer() -> None:
    tokens = [*"，".encode(), *"适".encode()]
    output = choice(logprobs=1, prompt=Prompt([1], "天气非常好"))
    rows = [row for delta in run(output, tokens, [2, 1, 3]) for row in delta.tokens or ()]
    assert [row.text_offset for row in rows] == [5, 5, 5, 6, 6, 6]
    assert rows[3].token == "bytes:\\xe9"


@given(st.lists(st.sampled_from(IDS), min_size=1, max_size=30))
def test_echo_rows(tokens: list[int]) -> None:
    prompt = Prompt(tokens, TOKENIZER.decode(tokens))
    delta = choice(logprobs=1, prompt=prompt).echo([TokenLogprobs(-1.0, [(97, -1.0)]) for _ in tokens[1:]])
    assert delta.text == prompt.text
    assert delta.tokens is not None
    assert [row.token_id for row in delta.tokens] == tokens
    assert (delta.tokens[0].logprob, delta.tokens[0].top, delta.tokens[0].text_offset) == (None, None, 0)
    assert all(row.text_offset <= len(prompt.text) for row in delta.tokens)


def test_rows_hold_the_top_and_the_token_itself_as_one_float() -> None:
    inside = TokenLogprobs(-0.3, [(97, -0.1), (98, -0.30000001), (99, -4.0)])
    outside = TokenLogprobs(-math.inf, [(97, -0.1), (98, -0.2), (99, -math.inf)])
    delta = choice(logprobs=2).push([98, 99], [inside, outside])
    assert delta.tokens is not None
    assert [row.top for row in delta.tokens] == [{"a": -0.1, "b": -0.3}, {"a": -0.1, "b": -0.2, "c": -9999.0}]
    assert [row.logprob for row in delta.tokens] == [-0.3, -9999.0]


def test_logprobs_0_has_no_alternatives() -> None:
    delta = choice(logprobs=0).push([98], [TokenLogprobs(-0.3, [(97, -0.1)])])
    assert delta.tokens is not None
    assert (delta.tokens[0].logprob, delta.tokens[0].top) == (-0.3, None)


def test_names_of_tokens_are_distinct() -> None:
    texts = TokenTexts(TOKENIZER)
    assert len({texts[id_] for id_ in [*IDS, EOS]}) == len(IDS) + 1
    assert texts[0x82] == "bytes:\\x82"
    assert texts[TOKENS["日本".encode()[:4]]] == "bytes:\\xe6\\x97\\xa5\\xe6"  # all of it, though a part is valid
    delta = choice(logprobs=1, as_ids=True).push([98], [TokenLogprobs(-0.3, [(97, -0.1)])])
    assert delta.tokens is not None
    assert (delta.tokens[0].token, delta.tokens[0].top) == ("token_id:98", {"token_id:97": -0.1, "token_id:98": -0.3})


@given(stoppy_ids, some_bursts, some_stops)
def test_every_token_has_its_row_once_however_they_come(
    tokens: list[int], bursts: list[int], stops: tuple[str, ...]
) -> None:
    def rows(bursts: list[int]) -> list[object]:
        deltas = run(choice(stop=stops, logprobs=2), tokens, bursts)
        return [row for delta in deltas for row in delta.tokens or ()]

    assert rows(bursts) == rows([])


HOSTILE = ["a" * 256, "ab" * 128, "a" * 255 + "b", "b" + "a" * 255, "aab" * 85, "\n" * 256, " " * 255 + "x"]


@pytest.mark.parametrize("text", ["a" * 4000, "ab" * 2000, "aab" * 1300, ("a" * 254 + "c") * 15, "\n" * 4000])
def test_a_character_costs_the_same_however_hostile_the_stop_strings(text: str) -> None:
    """In steps of the automaton: each character is one, and what it falls back it has come forward before."""
    machine = automaton(tuple(HOSTILE))
    steps, state = 0, 0
    for character in text:
        while state and character not in machine.next[state]:
            state, steps = machine.fallback[state], steps + 1
        state, steps = machine.next[state].get(character, 0), steps + 1
    assert steps <= 2 * len(text)


@given(st.text("ab", max_size=600), st.lists(st.text("ab", min_size=1, max_size=256), min_size=1, max_size=16))
@settings(max_examples=50)
def test_long_stop_strings_cut_where_the_first_completes(text: str, stops: list[str]) -> None:
    deltas = run(choice(stop=tuple(stops)), list(text.encode()) or [97])
    assert (text_of(deltas), deltas[-1].stop_reason) == cut(text or "a", tuple(stops))
