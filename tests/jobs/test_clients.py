"""The real clients run jobs from the upload to a completion of what was made: the current openai, and 0.28.1."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from outside import Environment, say
from serving import RunningServer, serving

HARBOUR = Path(__file__).parents[2] / "examples" / "harbour-log"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "supervised", "supervised": {"trainable": "lora", "lora": {"rank": 4, "targets": ["c_attn"]}}},
    "full": {"type": "supervised", "supervised": {"trainable": "full"}},
    "output_layer": {"type": "supervised", "supervised": {"trainable": "output_layer"}},
    "init": {"type": "supervised", "supervised": {"init": "xavier", "shape": {"n_layer": 1}}},
    "distillation": {"type": "distillation", "distillation": {"temperature": 2, "hidden": 1}},
}
TEMPLATE = (
    "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FINE_TUNE = """
import json, openai
openai.api_base = {url!r} + "/v1"
openai.api_key = "sk-anything"
say = lambda value: print(json.dumps(value))
train = openai.File.create(file=open({train!r}, "rb"), purpose="fine-tune", user_provided_filename="train.jsonl")
job = openai.FineTune.create(training_file=train["id"], model="davinci", n_epochs={epochs}, suffix="old")
say([event["message"] for event in openai.FineTune.stream_events(job["id"])])
job = openai.FineTune.retrieve(job["id"])
say([job["status"], job["training_files"][0]["filename"], job["hyperparams"]["n_epochs"]])
say([each["id"] for each in openai.FineTune.list()["data"]] == [job["id"]])
say(len(openai.FineTune.list_events(job["id"])["data"]))
newer = openai.FineTuningJob.retrieve(job["id"])
say([newer["object"], len(openai.FineTuningJob.list_events(job["id"], limit=2)["data"])])
prompt = "Harbour log, 9 May:"
say(openai.Completion.create(model=job["fine_tuned_model"], prompt=prompt, max_tokens=40, seed=1)["choices"][0]["text"])
say(openai.Model.retrieve(job["fine_tuned_model"])["id"] == job["fine_tuned_model"])
say(openai.Model.delete(job["fine_tuned_model"])["deleted"])
say(openai.File.delete(train["id"])["deleted"])
"""


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    flags = ("--threads", "1", "--data-dir", str(tmp_path_factory.mktemp("jobs")), "--chat-template", str(template))
    with serving(tiny, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "train.jsonl"
    path.write_bytes(b"".join((HARBOUR / "train.jsonl").read_bytes().splitlines(keepends=True)[:8]))
    return path


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)


def wait(client: openai.OpenAI, id_: str, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(id_)).status not in {"succeeded", "failed", "cancelled"}:
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    assert job.status == "succeeded", job.error
    return job


def measured(client: openai.OpenAI, id_: str) -> list[float]:
    """Validation losses, in their order."""
    events: list[Any] = list(client.fine_tuning.jobs.list_events(id_, limit=100))
    data = [event.data for event in events[::-1] if event.type == "metrics"]
    return [each["full_valid_loss"] for each in data if each["full_valid_loss"] is not None]


@pytest.mark.parametrize("names", [("lora", "distillation"), pytest.param(tuple(METHODS), marks=pytest.mark.slow)])
def test_the_current_client_with_each_method(server: RunningServer, lines: Path, names: tuple[str, ...]) -> None:
    client = client_of(server)
    train = client.files.create(file=lines, purpose="fine-tune")
    assert client.files.wait_for_processing(train.id).status == "processed"
    jobs = {
        name: client.fine_tuning.jobs.create(
            model="davinci", training_file=train.id, suffix=name, seed=3, hyperparameters=openai.omit,
            method={**method, method["type"]: {**method[method["type"]], "hyperparameters": {"max_steps": 2}}},  # type: ignore[typeddict-item]
        )
        for name, method in METHODS.items()
        if name in names
    }  # fmt: skip
    texts = set()
    for name, job in jobs.items():
        done = wait(client, job.id)
        assert done.fine_tuned_model is not None
        answer = client.completions.create(model=done.fine_tuned_model, prompt="Harbour log", max_tokens=8, seed=1)
        assert answer.model == done.fine_tuned_model
        texts.add((answer.choices[0].text, answer.system_fingerprint))
        assert done.method.supervised is not None or name == "distillation"
    assert len(texts) == len(jobs)
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=len(jobs)).data]
    assert listed == [job.id for job in jobs.values()][::-1]
    served = {model.id for model in client.models.list()}
    assert {client.fine_tuning.jobs.retrieve(id_).fine_tuned_model for id_ in listed} <= served
    first = client.fine_tuning.jobs.retrieve(jobs["lora"].id)
    further = client.fine_tuning.jobs.create(
        model=str(first.fine_tuned_model), training_file=train.id, hyperparameters={"n_epochs": 1}
    )
    cancelled = client.fine_tuning.jobs.create(model="davinci", training_file=train.id)
    assert client.fine_tuning.jobs.pause(cancelled.id).status == "paused"  # type: ignore[comparison-overlap]
    assert client.fine_tuning.jobs.resume(cancelled.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(cancelled.id).status == "cancelled"
    wait(client, further.id)
    assert client.models.delete(str(first.fine_tuned_model)).deleted
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=str(first.fine_tuned_model), prompt="a")
    bad = client.files.create(file=("bad.jsonl", b'{"text": "a"}\n{"x": 1}\n\nnothing\n'), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="davinci", training_file=bad.id)
    with pytest.raises(AssertionError, match=r"line 2: unknown key 'x'.*; line 4: it is not JSON"):
        wait(client, job.id)
    assert client.files.content(train.id).read() == lines.read_bytes()
    assert client.files.delete(train.id).deleted


def test_the_current_client_teaches_preferences(server: RunningServer, tmp_path: Path) -> None:
    lines = [
        {
            "input": {"messages": [{"role": "user", "content": f"Ship {n}?"}]},
            "preferred_output": [{"role": "assistant", "content": "In at noon."}],
            "non_preferred_output": [{"role": "assistant", "content": "I do not know."}],
        }
        for n in range(8)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    client = client_of(server)
    pairs = client.files.create(file=file, purpose="fine-tune").id
    hyperparameters: Any = {"beta": 0.2, "n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 20}
    job = client.fine_tuning.jobs.create(
        model="davinci", training_file=pairs, validation_file=pairs, suffix="dpo", seed=1,
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    )  # fmt: skip
    assert job.method is not None
    assert job.method.dpo is not None
    done = wait(client, job.id)
    losses = measured(client, done.id)
    assert losses[-1] < losses[0] < 0.7
    answer = client.completions.create(
        model=str(done.fine_tuned_model), prompt="user: Ship 1?\nassistant: ", max_tokens=4
    )
    assert answer.model == done.fine_tuned_model


def test_openai_0_28(server: RunningServer, environment: Environment, lines: Path) -> None:
    python = environment("openai-0.28.1", "openai==0.28.1")
    with_others = client_of(server).fine_tuning.jobs.list().data
    script = FINE_TUNE.format(url=server.url, train=str(lines), epochs=1)
    messages, job, listed, events, newer, text, known, *deleted = say([python, "-c", script])
    assert messages[-1] == "The job has successfully completed"
    assert job == ["succeeded", "train.jsonl", 1]
    assert listed is (not with_others)
    assert events == len(messages)
    assert newer == ["fine_tuning.job", 2]
    assert text
    assert known
    assert deleted == [True, True]


# === The default model, and data that it can be seen to have learnt ===


@pytest.fixture(scope="module")
def harbour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(None, "--data-dir", str(tmp_path_factory.mktemp("harbour"))) as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["lora", "full", "output_layer", "distillation"])
def test_the_default_model_learns_a_style(harbour: RunningServer, name: str) -> None:
    client = client_of(harbour)
    done = learn(client, name)
    losses = measured(client, done.id)
    print(json.dumps({"method": name, "seconds": done.finished_at - done.created_at, "valid_loss": losses}))
    assert losses[-1] < losses[0]
    assert losses[-1] < 3.0
    texts = [
        client.completions.create(
            model=str(done.fine_tuned_model), prompt="Harbour log, 9 May:", max_tokens=60, temperature=0.7, seed=seed
        ).choices[0].text
        for seed in range(4)
    ]  # fmt: skip
    print(json.dumps(texts))
    if name != "output_layer":
        assert sum("Wind" in text for text in texts) >= 2


def learn(client: openai.OpenAI, name: str) -> Any:
    """Two times through the harbour's log, by this method; what is distilled is what has learnt it in full."""
    train, valid = (
        client.files.create(file=HARBOUR / f"{part}.jsonl", purpose="fine-tune").id for part in ("train", "valid")
    )
    method = METHODS[name] if name != "lora" else {"type": "supervised", "supervised": {}}
    asked = {**method, method["type"]: {**method[method["type"]], "hyperparameters": {"n_epochs": 2}}}
    job = client.fine_tuning.jobs.create(
        model=str(learn(client, "full").fine_tuned_model) if name == "distillation" else "davinci",
        training_file=train,
        validation_file=valid,
        suffix=name,
        seed=1,
        method=asked,  # type: ignore[arg-type]
    )
    return wait(client, job.id, 1000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_model_with_openai_0_28(harbour: RunningServer, environment: Environment) -> None:
    python = environment("openai-0.28.1", "openai==0.28.1")
    script = FINE_TUNE.format(url=harbour.url, train=str(HARBOUR / "train.jsonl"), epochs=2)
    messages, job, _, _, _, text, *_ = say([python, "-c", script], timeout=1000)
    assert (messages[-1], job[0]) == ("The job has successfully completed", "succeeded")
    assert len(text) > 20
