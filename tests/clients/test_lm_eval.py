"""lm-evaluation-harness, unmodified: what it measures through the server is what transformers measures by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from outside import Environment, say
from serving import RunningServer, serving
from transformers import GPT2LMHeadModel

from model.tokenizer import read_tokenizer
from server.checkpoint import EMBEDDED

SAMPLE = Path(__file__).parent / "data" / "lambada_200.jsonl"
STOPS = ["\n\n", ".", "!", "?", ";", "Q:"]  # and the harness adds the end of text: seven
PREDICT = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {sample}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}, {{metric: acc}}]
"""
CONTINUE = """
task: go_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {sample}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text.split(' ')[:12]|join(' ')}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: {stops}, max_gen_toks: 40, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
SCRIPT = """
import json, sys, lm_eval
from lm_eval.tasks import TaskManager
kind, arguments, tasks, limit = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
results = lm_eval.simple_evaluate(model=kind, model_args=arguments, tasks=["last_word", "go_on"], batch_size=1,
                                  task_manager=TaskManager(include_path=tasks, include_defaults=False),
                                  samples=limit, bootstrap_iters=0)
samples = results["samples"]
print(json.dumps({
    "scores": [sample["resps"][0][0] for sample in samples["last_word"]],
    "accuracy": results["results"]["last_word"]["acc,none"],
    "texts": [sample["resps"][0][0] for sample in samples["go_on"]],
}))
"""


@pytest.fixture(scope="module")
def default() -> Iterator[RunningServer]:
    with serving(None, "--threads", "1") as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_its_figures_are_those_of_transformers(
    default: RunningServer, environment: Environment, tmp_path: Path
) -> None:
    (tmp_path / "last_word.yaml").write_text(PREDICT.format(sample=SAMPLE))
    (tmp_path / "go_on.yaml").write_text(CONTINUE.format(sample=SAMPLE, stops=json.dumps(STOPS)))
    python = environment("lm-eval", "lm-eval[api,hf]==0.4.13", beside_ours=True, timeout=600)
    limits = json.dumps({"last_word": list(range(200)), "go_on": list(range(40))})

    def evaluate(kind: str, **arguments: Any) -> dict[str, Any]:
        (figures,) = say([python, "-c", SCRIPT, kind, json.dumps(arguments), tmp_path, limits], timeout=700)
        return figures

    through_us = evaluate(
        "local-completions",
        model="gpt2-server-default",
        base_url=f"{default.url}/v1/completions",
        max_length=1024,
        num_concurrent=4,
    )
    by_itself = evaluate("hf", pretrained=str(EMBEDDED), dtype="float32", device="cpu")
    assert len(through_us["scores"]) == 200
    for (ours, our_greedy), (theirs, their_greedy) in zip(through_us["scores"], by_itself["scores"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert our_greedy == their_greedy
    assert through_us["accuracy"] == by_itself["accuracy"]
    assert through_us["texts"] == by_itself["texts"]


def passages(count: int) -> list[tuple[str, str]]:
    """Each as its beginning and its last word, as the harness cuts them."""
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()[:count]]
    return [(text.rpartition(" ")[0], " " + text.rpartition(" ")[2]) for text in texts]


def test_the_requests_it_sends_are_scored_as_transformers_scores_them(default: RunningServer) -> None:
    """The harness's own arithmetic on the harness's own requests, without the harness."""
    tokenizer = read_tokenizer(EMBEDDED, 50257, (50256,))
    theirs = GPT2LMHeadModel.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    pairs = [(tokenizer.encode(start), tokenizer.encode(end)) for start, end in passages(24)]
    for at in range(0, len(pairs), 8):
        batch = pairs[at : at + 8]
        prompts = [start + end for start, end in batch]
        answer = default.complete(
            model="gpt2-server-default", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
        )
        for choice, (start, end) in zip(answer["choices"], batch, strict=True):
            scores, top = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
            ours = sum(scores[len(start) : -1])
            greedy = all(
                value == max(alternatives.values())
                for value, alternatives in zip(scores[len(start) : -1], top[len(start) : -1], strict=True)
            )
            with torch.inference_mode():
                rows = theirs(torch.tensor([start + end])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            expected = rows[range(len(end)), end].sum().item()
            assert ours == pytest.approx(expected, abs=1e-3)
            assert greedy == (rows.argmax(-1).tolist() == end)


def test_texts_it_asks_for_end_at_its_stops(default: RunningServer) -> None:
    tokenizer = read_tokenizer(EMBEDDED, 50257, (50256,))
    stops = [*STOPS, "<|endoftext|>"]
    for start, _ in passages(6):
        ids = tokenizer.encode(start)
        ask = {"model": "gpt2-server-default", "prompt": [ids], "max_tokens": 40, "temperature": 0, "seed": 1234}
        (whole,) = default.complete(**ask, stop=[])["choices"]
        (choice,) = default.complete(**ask, stop=stops)["choices"]
        ends = [whole["text"].find(stop) for stop in stops if stop in whole["text"]]
        assert choice["text"] == whole["text"][: min(ends, default=None)]


def test_whole_contexts_are_scored_from_the_start_of_a_document(default: RunningServer) -> None:
    """loglikelihood_rolling: the end-of-text token first, 1,023 ids and the one it does not look at."""
    tokenizer = read_tokenizer(EMBEDDED, 50257, (50256,))
    ids = [50256, *tokenizer.encode(" ".join(start for start, _ in passages(40)))[:1022]]
    answer = default.complete(prompt=[ids], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 1024


def test_its_tokenizer_is_ours(default: RunningServer) -> None:
    """What it asks at its start; with these answers it needs no tokenizer of its own."""
    assert httpx.get(f"{default.url}/tokenizer_info").json()["eos_token"] == "<|endoftext|>"
    ask = {"prompt": "test", "add_special_tokens": False}
    tokens = httpx.post(f"{default.url}/tokenize", json=ask).json()["tokens"]
    assert httpx.post(f"{default.url}/detokenize", json={"tokens": tokens}).json() == {"prompt": "test"}
