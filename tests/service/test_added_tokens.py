"""A whole server on a fine-tune as people have it: added tokens, an end of its own, a bos before each text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import RunningServer, serving
from transformers import AutoTokenizer, GPT2Tokenizer
from vocabularies import write_model

import model

DEFAULT = Path(model.__file__).parent / "default"
PAD, START, STOP, CUSTOM = 50257, 50258, 50259, 50260
WORD = 262  # " the", which config.json names as an end
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|stop|>{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tuned")
    tokenizer = GPT2Tokenizer.from_pretrained(DEFAULT)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>", "<|stop|>"]})
    tokenizer.add_tokens(["<custom>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    write_model(directory, len(tokenizer), eos_token_id=WORD)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [WORD, STOP, CUSTOM]}))
    return directory


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    with serving(checkpoint, "--threads", "1") as running:
        yield running


def post(server: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    decoded: dict[str, Any] = answer.json()
    return decoded


def test_added_tokens_are_read_and_written(server: RunningServer, checkpoint: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    assert post(server, "/tokenize", prompt="[PAD] pad")["tokens"] == [PAD, 14841]
    for text in ("a<custom>b", "<|im_start|> x<|stop|>", "[PAD]<|endoftext|><custom> "):
        assert post(server, "/tokenize", prompt=text)["tokens"] == theirs(text)["input_ids"]
    assert post(server, "/detokenize", tokens=[40, CUSTOM, 40])["prompt"] == "I<custom>I"


def test_a_sampled_added_token_has_text_and_a_name_and_a_special_one_is_left_out(server: RunningServer) -> None:
    ask = {"prompt": "a", "max_tokens": 2, "logprobs": 1}
    choice = server.complete(**ask, allowed_token_ids=[CUSTOM])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("<custom><custom>", "length")  # an added word, not an end
    assert choice["logprobs"]["tokens"] == ["<custom>", "<custom>"]
    assert choice["logprobs"]["text_offset"] == [1, 9]
    for skip, text in ((True, ""), (False, "[PAD][PAD]")):
        choice = server.complete(**ask, allowed_token_ids=[PAD], skip_special_tokens=skip)["choices"][0]
        assert (choice["text"], choice["logprobs"]["tokens"]) == (text, ["[PAD]", "[PAD]"])


@pytest.mark.parametrize("end", [50256, STOP])
def test_the_tokenizers_eos_and_the_special_tokens_that_are_named_end_a_text(server: RunningServer, end: int) -> None:
    fields = {"prompt": "a", "allowed_token_ids": [end, 40], "logit_bias": {str(end): 100}, "max_tokens": 4}
    choice = server.complete(**fields)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    choice = server.complete(**fields, min_tokens=2, return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == [40, 40, end]
    choice = server.complete(**fields, ignore_eos=True, return_token_ids=True)["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"]) == ([end] * 4, "length")


def test_an_ordinary_word_ends_nothing_and_the_start_says_so(server: RunningServer) -> None:
    choice = server.complete(prompt="a", allowed_token_ids=[WORD], max_tokens=3)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" the the the", "length")
    said = "\n".join(server.lines)
    assert "Token 262 (' the'), which its files name as an end, is an ordinary word and ends nothing" in said
    assert "--chat-template auto turns chat on" in said


def test_a_grammar_may_end_with_any_end(server: RunningServer) -> None:
    fields = {"prompt": "a", "guided_regex": "(yes)+", "allowed_token_ids": [8505, STOP], "max_tokens": 8}
    choice = server.complete(**fields, logit_bias={str(STOP): 100})["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("yes", "stop", None)


def test_the_operator_has_the_last_word(checkpoint: Path, tmp_path: Path) -> None:
    """On the ends, on chat; and a bos that the tokenizer puts before a text."""
    directory = Path(shutil.copytree(checkpoint, tmp_path / "bos"))
    (directory / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DEFAULT / name, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    theirs = AutoTokenizer.from_pretrained(directory)
    flags = ["--threads", "1", "--eos-token-id", str(WORD), "--chat-template", "auto"]
    with serving(directory, *flags) as server:
        choice = server.complete(prompt="a", allowed_token_ids=[WORD], max_tokens=3)["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
        for added in (True, False):
            asked = {"prompt": "a b", "add_special_tokens": added}
            expected = theirs("a b", add_special_tokens=added)["input_ids"]
            assert post(server, "/tokenize", **asked)["tokens"] == expected
            choice = server.complete(**asked, max_tokens=1, echo=True, logprobs=0, return_token_ids=True)["choices"][0]
            assert choice["prompt_token_ids"] == expected
            assert choice["logprobs"]["text_offset"][len(expected) - 2 :] == [0, 1, 3]
        assert server.complete(prompt=[40], max_tokens=1, return_token_ids=True)["choices"][0]["prompt_token_ids"] == [
            40
        ]
        assert post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=2)
