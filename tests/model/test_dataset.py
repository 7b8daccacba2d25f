"""What training reads: every bad line is named, and what is learnt is what was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.chat_template import ChatTemplate
from model.config import read_config
from model.errors import DataError, TemplateRefused
from model.tokenizer import Tokenizer, read_tokenizer
from model.training.dataset import Example, Reader, TooLong, read_examples, read_preferences
from server.checkpoint import EMBEDDED

END = 50256
CONTEXT = 32
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = read_config(EMBEDDED)
    return read_tokenizer(EMBEDDED, config.vocab_size, config.eos_token_ids)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, named={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def write(path: Path, *lines: Any) -> Path:
    path.write_bytes(
        b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)
    )
    return path


def learnt(example: Example, tokenizer: Tokenizer) -> str:
    assert not example.learnt[0]
    return tokenizer.decode(example.tokens[example.learnt].tolist())


def read_one(tmp_path: Path, line: Any, tokenizer: Tokenizer, **more: Any) -> Example:
    (example,) = read_examples(write(tmp_path / "train.jsonl", line), Reader(tokenizer, CONTEXT, **more))
    return example


def test_a_completion_is_learnt_and_its_prompt_is_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    example = read_one(tmp_path, {"prompt": "What is it?", "completion": " A ship."}, tokenizer)
    assert tokenizer.decode(example.tokens.tolist()) == "What is it? A ship.<|endoftext|>"
    assert learnt(example, tokenizer) == " A ship.<|endoftext|>"


def test_the_end_is_added_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    example = read_one(tmp_path, {"prompt": "a", "completion": " b<|endoftext|>"}, tokenizer)
    assert example.tokens.tolist().count(END) == 1


def test_an_empty_prompt_and_a_text_begin_from_the_end_of_another(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for line in ({"prompt": "", "completion": "Hello"}, {"text": "Hello"}):
        example = read_one(tmp_path, line, tokenizer)
        assert example.tokens[0] == END
        assert learnt(example, tokenizer) == "Hello<|endoftext|>"


def test_a_long_text_becomes_windows_that_learn_each_token_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = " ".join(f"word{i}" for i in range(60))
    examples = read_examples(write(tmp_path / "train.jsonl", {"text": text}), Reader(tokenizer, CONTEXT))
    assert len(examples) > 2
    assert all(len(each.tokens) <= CONTEXT + 1 for each in examples)
    assert "".join(learnt(each, tokenizer) for each in examples) == text + "<|endoftext|>"


def test_of_a_dialogue_the_assistants_words_are_learnt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ahoy", "weight": 0},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me"},
        {"role": "user", "content": "Bye"},
    ]
    example = read_one(tmp_path, {"messages": messages}, tokenizer, template=template(CHAT))
    assert (
        tokenizer.decode(example.tokens.tolist())
        == "<user>Hi\n<assistant>Ahoy\n<user>Who?\n<assistant>Me\n<|endoftext|>"
    )
    assert learnt(example, tokenizer) == "Me\n<|endoftext|>"


def test_every_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad = {
        2: (b"{", "not JSON"),
        4: (b"[1]", "not a JSON object"),
        5: (b'"\xff"', "not UTF-8"),
        6: ({"prompt": "a"}, "must have 'prompt' and 'completion'"),
        7: ({"prompt": "a", "completions": "b"}, "unknown key 'completions'"),
        8: ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        9: ({"prompt": 1, "completion": "b"}, "'prompt' is not a string"),
        10: ({"prompt": "a " * 50, "completion": "b"}, "53 tokens; the model's context is 32"),
        11: ({"messages": [{"role": "user", "content": "a"}]}, "need a chat template"),
        12: (b'{"text": "\\ud800"}', "surrogate"),
        13: (b"[" * 100_000, "not JSON"),
    }
    lines = [bad[number][0] if number in bad else {"text": "fine"} for number in range(1, 15)]
    with pytest.raises(DataError) as caught:
        read_examples(write(tmp_path / "train.jsonl", *lines), Reader(tokenizer, CONTEXT, too_long=TooLong.REFUSE))
    assert [problem.line for problem in caught.value.problems] == list(bad)
    for problem in caught.value.problems:
        assert bad[problem.line][1] in problem.message
    assert str(caught.value) == "train.jsonl, line 2: it is not JSON (and 10 more bad lines)"


def test_bad_dialogues_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    fine = {"role": "assistant", "content": "a"}
    lines = [
        {"messages": "a"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{**fine, "weight": 2}]},
        {"messages": [fine]},
    ]
    path = write(tmp_path / "train.jsonl", *lines)
    with pytest.raises(DataError) as caught:
        read_examples(path, Reader(tokenizer, CONTEXT, template(CHAT)))
    assert [problem.line for problem in caught.value.problems] == [1, 2, 3, 4]
    refusing = template("{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match="line 5: The chat template refuses these messages: no system role"):
        read_examples(
            write(tmp_path / "train.jsonl", b"", b"", b"", b"", lines[4]), Reader(tokenizer, CONTEXT, refusing)
        )


@pytest.mark.parametrize("source", ["{% for %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"])
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(TemplateRefused):
        template(source).render([], add_generation_prompt=False)


def test_a_file_that_is_missing_or_empty(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^cannot read gone.jsonl: No such file or directory$"):
        read_examples(tmp_path / "gone.jsonl", Reader(tokenizer, CONTEXT))
    with pytest.raises(DataError, match=r"^train.jsonl holds no examples$"):
        read_examples(write(tmp_path / "train.jsonl", b"", b"  "), Reader(tokenizer, CONTEXT))


@pytest.mark.parametrize("too_long", TooLong)
def test_an_example_longer_than_the_context_is_cut_or_split_and_counted(
    too_long: TooLong, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = [
        {"prompt": "a", "completion": " b" * 40},
        {"prompt": "a " * 50, "completion": "b"},  # of which the prompt alone is more than a context
        {"prompt": "a", "completion": " b"},
    ]
    reader = Reader(tokenizer, CONTEXT, too_long=too_long)
    path = write(tmp_path / "train.jsonl", *lines)
    if too_long is TooLong.REFUSE:
        with pytest.raises(DataError) as caught:
            read_examples(path, reader)
        assert [problem.line for problem in caught.value.problems] == [1, 2]
        return
    examples = read_examples(path, reader)
    assert all(1 < len(each.tokens) <= CONTEXT + 1 and each.targets for each in examples)
    said = [learnt(each, tokenizer) for each in examples]
    notes = reader.counts.notes("train.jsonl", CONTEXT, too_long)
    if too_long is TooLong.SPLIT:
        assert said == [" b" * 32, " b" * 8 + "<|endoftext|>", "b<|endoftext|>", " b<|endoftext|>"]
        assert notes == ["train.jsonl: examples longer than the context of 32 tokens, split: 2"]
    else:
        assert said == [" b" * 32, " b<|endoftext|>"]
        assert notes == [
            "train.jsonl: examples longer than the context of 32 tokens, cut off at it: 2",
            "train.jsonl: examples left out, of which nothing to learn is within the context: 1",
        ]


def test_keys_that_say_nothing_here_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [{"text": "a", "id": 7}, {"text": "b", "id": 8, "prompt": "x"}, {"text": "c"}]
    reader = Reader(tokenizer, CONTEXT)
    examples = read_examples(write(tmp_path / "train.jsonl", *lines), reader)
    assert [learnt(each, tokenizer) for each in examples] == ["a<|endoftext|>", "b<|endoftext|>", "c<|endoftext|>"]
    assert reader.counts.unused == {"id": 2, "prompt": 1}
    (note,) = reader.counts.notes("train.jsonl", CONTEXT, TooLong.TRUNCATE)
    assert "'id' (2), 'prompt' (1)" in note


def test_preferences_are_texts_or_messages(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = [{"role": "user", "content": "Hi"}]
    lines = [
        {"prompt": "Hi", "chosen": " Ahoy", "rejected": " No"},
        {
            "input": {"messages": asked},
            "preferred_output": [{"role": "assistant", "content": "Ahoy"}],
            "non_preferred_output": [{"role": "assistant", "content": "No"}],
        },
    ]
    pairs = read_preferences(write(tmp_path / "train.jsonl", *lines), Reader(tokenizer, CONTEXT, template(CHAT)))
    said = [
        [(tokenizer.decode(part.tokens.tolist()), learnt(part, tokenizer)) for part in each.parts] for each in pairs
    ]
    assert said[0] == [("Hi Ahoy<|endoftext|>", " Ahoy<|endoftext|>"), ("Hi No<|endoftext|>", " No<|endoftext|>")]
    assert said[1][0] == ("<user>Hi\n<assistant>Ahoy\n<|endoftext|>", "Ahoy\n<|endoftext|>")
    assert said[1][1] == ("<user>Hi\n<assistant>No\n<|endoftext|>", "No\n<|endoftext|>")


def test_bad_preferences_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    said = [{"role": "assistant", "content": "a"}]
    whole = {"input": {"messages": []}, "preferred_output": said, "non_preferred_output": said}
    bad = [
        ({"text": "a"}, "it must have 'input', 'preferred_output'"),
        ({"prompt": "a", "chosen": "b", "rejected": 1}, "'rejected' is not a string"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the two answers are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "an answer is empty"),
        ({**whole, "input": []}, "'input' is not an object with 'messages'"),
        ({**whole, "preferred_output": "a"}, "'preferred_output' is not a list of one message"),
        ({**whole, "preferred_output": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ({**whole, "input": {"messages": [1]}}, "'messages' is not a list of objects"),
    ]
    path = write(tmp_path / "train.jsonl", *(line for line, _ in bad))
    with pytest.raises(DataError) as caught:
        read_preferences(path, Reader(tokenizer, CONTEXT, template(CHAT)))
    assert len(caught.value.problems) == len(bad)
    for problem, (_, message) in zip(caught.value.problems, bad, strict=True):
        assert message in problem.message
