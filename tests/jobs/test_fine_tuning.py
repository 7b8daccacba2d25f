"""Fine-tuning jobs over HTTP, with a trainer that learns nothing: their lives, their ends, what is served of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from asking import error_of, events_of
from tuned import CONFIG, Tuned, tuned, use_fake_trainer

from model.training.checkpoint import hugging_face_config
from server.jobs import trainer
from server.jobs.jobs import OPEN_MAX

Story = Callable[[Tuned], Awaitable[None]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of a model as a job has to look at."""
    directory = tmp_path_factory.mktemp("base")
    (directory / "config.json").write_text(json.dumps(hugging_face_config(CONFIG)))
    return directory


@pytest.fixture
def tell(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a story against a server; one told twice finds what the first has left."""
    use_fake_trainer(monkeypatch)

    def tell(story: Story, **how: Any) -> None:
        async def run() -> None:
            async with tuned(tmp_path / "data", base, **how) as server:
                await story(server)

        asyncio.run(run())

    return tell


def test_a_job_from_its_file_to_its_model(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        file = await server.upload()
        asked = {"model": "text-davinci-002", "training_file": file, "suffix": "My Log!", "seed": 7}
        made = (await server.client.post("/v1/fine_tuning/jobs", json={**asked, "metadata": {"a": "b"}})).json()
        assert made == {
            "id": made["id"], "object": "fine_tuning.job", "created_at": made["created_at"], "finished_at": None,
            "estimated_finish": None, "status": "queued", "model": "gpt2", "fine_tuned_model": None,
            "organization_id": "gpt2-server", "training_file": file, "validation_file": None, "result_files": [],
            "trained_tokens": None, "seed": 7, "metadata": {"a": "b"}, "integrations": [], "error": None,
            "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}, "user_provided_suffix": "my-log",
        }  # fmt: skip
        done = await server.ended(made["id"])
        name = f"ft:gpt2:my-log:{made['id'][-8:]}"
        assert (done["status"], done["fine_tuned_model"], done["trained_tokens"]) == ("succeeded", name, 40)
        assert done["finished_at"] >= done["created_at"]
        assert done["hyperparameters"] == {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 1.0}
        assert await server.messages(made["id"]) == [
            f"Created fine-tuning job: {made['id']}",
            f"Validating training file: {file}",
            "Fine-tuning job started",
            *(f"Step {n}/4: training loss={5 - n}.0000" for n in (1, 2)),
            "Checkpoint created at step 2",
            *(f"Step {n}/4: training loss={5 - n}.0000" for n in (3, 4)),
            f"New fine-tuned model created: {name}",
            "The job has successfully completed",
        ]
        (point,) = (await server.client.get(f"/v1/fine_tuning/jobs/{made['id']}/checkpoints")).json()["data"]
        assert (point["step_number"], point["metrics"]) == (2, {"step": 2, "train_loss": 3.0})
        assert await server.models() == [name, point["fine_tuned_model_checkpoint"]]
        answer = await server.client.post("/v1/completions", json={"model": name, "prompt": "a"})
        assert answer.json()["model"] == name
        log = await server.client.get(f"/v1/files/{done['result_files'][0]}/content")
        assert log.text == ("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n4,1.0,0.25,1.5,0.5\n")
        wanted = json.loads((server.directory / "jobs" / made["id"] / "job.json").read_text())
        assert (wanted["hyperparameters"]["seed"], wanted["nice"], wanted["trainable"]) == (7, 19, "lora")

    tell(story)


def test_models_are_there_after_a_restart_until_they_are_deleted(tell: Any) -> None:
    made: dict[str, Any] = {}

    async def before(server: Tuned) -> None:
        made.update(await server.ended((await server.create())["id"]))

    async def after(server: Tuned) -> None:
        name = made["fine_tuned_model"]
        assert name in await server.models()
        again = await server.ended((await server.create(model=name))["id"])
        assert again["fine_tuned_model"].startswith("ft:gpt2::")
        adapter = server.directory / "jobs" / again["id"] / "out" / "model" / "made_from"
        assert adapter.read_text() == str(server.directory / "jobs" / made["id"] / "out" / "model")
        assert (await server.client.delete(f"/v1/models/{name}")).json() == {
            "id": name, "object": "model", "deleted": True,
        }  # fmt: skip
        assert name not in await server.models()
        assert not (server.directory / "jobs" / made["id"] / "out" / "model").exists()
        assert (await server.client.delete(f"/v1/models/{name}")).status_code == 404
        assert (await server.client.delete("/v1/models/gpt2")).status_code == 403
        assert (await server.client.post("/v1/completions", json={"model": name})).status_code == 404

    async def at_last(server: Tuned) -> None:
        assert made["fine_tuned_model"] not in await server.models()
        assert len(await server.models()) == 3

    for story in (before, after, at_last):
        tell(story)


def test_a_bad_file_is_named_line_by_line_and_nothing_is_trained(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        bad = await server.create("fail")
        good = await server.create("learn")
        failed = await server.ended(bad["id"])
        lines = "; ".join(f"line {n}: it is not JSON" for n in range(1, 11))
        assert (failed["status"], failed["fine_tuned_model"]) == ("failed", None)
        assert failed["error"] == {
            "code": "invalid_training_file", "param": "training_file",
            "message": f"The training_file has bad lines; {lines}; and 20 more.",
        }  # fmt: skip
        events = (await server.client.get(f"/v1/fine_tuning/jobs/{bad['id']}/events")).json()["data"]
        assert (events[0]["level"], len(events[0]["data"]["problems"])) == ("error", 30)
        assert (await server.ended(good["id"]))["status"] == "succeeded"
        assert not (server.directory / "jobs" / bad["id"] / "out").exists()  # swept before the next job began
        assert len(await server.models()) == 2

    tell(story)


def test_other_ends_of_a_trainer(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(server: Tuned) -> None:
        ends = {orders: await server.create(orders) for orders in ("nan", "full", "die", "crash")}
        assert (await server.ended(ends["nan"]["id"]))["error"]["code"] == "loss_is_no_number"
        full = (await server.ended(ends["full"]["id"]))["error"]
        assert (full["code"], full["message"][-24:]) == ("storage_error", "No space left on device.")
        killed = (await server.ended(ends["die"]["id"]))["error"]
        assert (killed["code"], killed["message"][:22]) == ("server_error", "The trainer was killed")
        assert (await server.ended(ends["crash"]["id"]))["status"] == "succeeded"
        assert server.lives(ends["crash"]["id"]) == 3
        monkeypatch.setattr(trainer, "COMMAND", ("/nowhere/python",))
        unstarted = await server.ended((await server.create())["id"])
        assert unstarted["error"]["code"] == "storage_error"

    tell(story)


def test_a_file_that_was_deleted_while_its_job_waited(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        first, second = await server.create("wait"), await server.create()
        await server.until(first["id"], lambda job: job["status"] == "running")
        assert (await server.client.delete(f"/v1/files/{second['training_file']}")).status_code == 200
        server.go(first["id"])
        failed = await server.ended(second["id"])
        assert failed["error"]["message"] == f"No such File object: {second['training_file']}"
        assert (await server.job(first["id"]))["status"] == "succeeded"

    tell(story)


def test_one_at_a_time_paused_resumed_and_cancelled(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        jobs = [await server.create("wait") for _ in range(3)]
        first, second, third = (job["id"] for job in jobs)
        await server.until(first, lambda job: job["status"] == "running")
        assert [(await server.job(id_))["status"] for id_ in (second, third)] == ["queued", "queued"]
        assert (await server.turn(first, "pause")).json()["status"] == "paused"
        await server.until(second, lambda job: job["status"] == "running")
        assert (await server.turn(second, "cancel")).json()["status"] == "cancelled"
        assert (await server.turn(third, "cancel")).json()["finished_at"] is not None
        assert (await server.turn(first, "resume")).json()["status"] == "queued"
        server.go(first)
        assert (await server.ended(first))["status"] == "succeeded"
        assert "Fine-tuning job resumed from step 1" in await server.messages(first)
        for id_, to in ((first, "cancel"), (first, "pause"), (second, "resume"), (second, "cancel")):
            assert error_of(await server.turn(id_, to), 400)["code"] == "invalid_job_status"
        for _ in range(500):
            if not (server.directory / "jobs" / second / "out").exists():
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail("what a cancelled job had written is still there")
        listed = (await server.client.get("/v1/fine_tuning/jobs", params={"limit": 2})).json()
        assert ([job["id"] for job in listed["data"]], listed["has_more"]) == ([third, second], True)

    tell(story)


def test_a_restart_goes_on_where_it_was(tell: Any) -> None:
    made: dict[str, Any] = {}

    async def before(server: Tuned) -> None:
        made.update(await server.create("wait"))
        await server.until(made["id"], lambda job: job["status"] == "running")

    async def after(server: Tuned) -> None:
        server.go(made["id"])
        assert (await server.ended(made["id"]))["status"] == "succeeded"
        assert "Fine-tuning job resumed from step 1" in await server.messages(made["id"])
        assert server.lives(made["id"]) == 2

    tell(before)
    tell(after)


def test_events_are_streamed_until_the_end(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        made = await server.create("wait")
        path = f"/v1/fine_tuning/jobs/{made['id']}/events"
        streaming = asyncio.create_task(server.client.get(path, params={"stream": "true"}))
        await server.until(made["id"], lambda job: job["status"] == "running")
        assert not streaming.done()
        server.go(made["id"])
        *events, done = events_of((await streaming).text)
        assert done == "[DONE]"
        said = [json.loads(event) for event in events]
        assert [event["message"] for event in said] == await server.messages(made["id"])
        metrics = [event["data"] for event in said if event["type"] == "metrics"]
        assert [(each["step"], each["train_loss"]) for each in metrics] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
        page = (await server.client.get(path, params={"limit": 3})).json()
        assert ([each["id"] for each in page["data"]], page["has_more"]) == ([e["id"] for e in said[:-4:-1]], True)
        rest = (await server.client.get(path, params={"after": page["last_id"]})).json()
        assert [each["id"] for each in rest["data"]] == [event["id"] for event in said[-4::-1]]

    tell(story)


def test_fine_tunes_as_openai_0_28_asks(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        file = await server.upload()
        body = {"training_file": file, "suffix": "x", "learning_rate_multiplier": 0.2, "prompt_loss_weight": 0.01}
        made = (await server.client.post("/v1/fine-tunes", json=body)).json()
        assert made == {
            "id": made["id"], "object": "fine-tune", "created_at": made["created_at"], "status": "pending",
            "updated_at": made["created_at"], "model": "gpt2", "fine_tuned_model": None, "result_files": [],
            "organization_id": "gpt2-server", "training_files": made["training_files"], "validation_files": [],
            "hyperparams": {
                "n_epochs": 4, "batch_size": None, "learning_rate_multiplier": 0.2, "prompt_loss_weight": 0,
            },
            "events": made["events"],
        }  # fmt: skip
        assert [each["id"] for each in made["training_files"]] == [file]
        path = f"/v1/fine-tunes/{made['id']}"
        *events, done = events_of((await server.client.get(f"{path}/events", params={"stream": "true"})).text)
        assert done == "[DONE]"
        assert all(set(json.loads(each)) == {"object", "created_at", "level", "message"} for each in events)
        ended = (await server.client.get(path)).json()
        assert (ended["status"], ended["fine_tuned_model"]) == ("succeeded", f"ft:gpt2:x:{made['id'][-8:]}")
        assert (await server.client.get(f"{path}/events")).json()["data"] == [json.loads(each) for each in events]
        await server.client.delete(f"/v1/files/{file}")
        (listed,) = (await server.client.get("/v1/fine-tunes")).json()["data"]
        assert (listed["id"], listed["training_files"][0]["status"]) == (made["id"], "deleted")
        waiting = (await server.create("wait"))["id"]
        assert (await server.client.post(f"/v1/fine-tunes/{waiting}/cancel")).json()["status"] == "cancelled"

    tell(story)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": "nope"}, "model"),
        ({"training_file": None}, "training_file"),
        ({"training_file": "file-nope"}, "training_file"),
        ({"validation_file": "../../etc"}, "validation_file"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "!!"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters"),
        ({"hyperparameters": {"n_epochs": 3}, "method": {"type": "supervised"}}, "hyperparameters"),
        ({"method": {"type": "reinforcement"}}, "method"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method"),
        ({"method": {"type": "supervised", "distillation": {}}}, "method"),
        ({"method": {"type": "supervised", "supervised": {"trainable": "half"}}}, "method"),
        ({"method": {"type": "supervised", "supervised": {"lora": {"targets": ["wte"]}}}}, "method"),
        ({"method": {"type": "supervised", "supervised": {"init": "gpt2", "trainable": "lora"}}}, "method"),
        ({"method": {"type": "supervised", "supervised": {"init": "gpt2", "shape": {"n_embd": 16}}}}, "method"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"early_stop": 2}}}}, "method"),
        ({"method": {"type": "distillation", "distillation": {"teacher": "nope"}}}, "model"),
        ({"method": {"type": "distillation", "distillation": {"soft": 0}}}, "method"),
        ({"method": {"type": "supervised", "supervised": 5}}, "method"),
        ({"method": "supervised"}, "method"),
    ],
)
def test_what_cannot_be_asked(tell: Any, fields: dict[str, Any], param: str) -> None:
    async def story(server: Tuned) -> None:
        body = {"model": "gpt2", "training_file": await server.upload(), **fields}
        answer = await server.client.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code in {400, 404}
        assert error_of(answer, answer.status_code)["param"] == param
        assert (await server.client.get("/v1/fine_tuning/jobs")).json()["data"] == []

    tell(story, running=False)


def test_what_else_cannot_be_asked(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        batch = await server.upload(purpose="batch")
        for path in ("/v1/fine_tuning/jobs", "/v1/fine-tunes"):
            answer = await server.client.post(path, json={"model": "gpt2", "training_file": batch})
            assert error_of(answer, 400)["param"] == "training_file"
        file = await server.upload()
        for name, value in (("compute_classification_metrics", True), ("prompt_loss_weight", 0.5)):
            answer = await server.client.post("/v1/fine-tunes", json={"training_file": file, name: value})
            assert error_of(answer, 400)["param"] == name
        deep: Any = {}
        for _ in range(100):
            deep = {"a": deep}
        answer = await server.client.post(
            "/v1/fine_tuning/jobs", json={"model": "gpt2", "training_file": file, "method": deep}
        )
        assert error_of(answer, 400)["param"] == "method"
        for path in ("", "/events", "/checkpoints", "/events?stream=true"):
            answer = await server.client.get(f"/v1/fine_tuning/jobs/nope{path}")
            assert error_of(answer, 404)["code"] == "fine_tune_not_found"

    tell(story, running=False)


def test_metadata_can_be_looked_for_and_jobs_are_bounded(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        ids = [(await server.create(metadata={"a": str(n)}))["id"] for n in range(2)]
        found = await server.client.get("/v1/fine_tuning/jobs", params={"metadata[a]": "1"})
        assert [job["id"] for job in found.json()["data"]] == [ids[1]]
        file = await server.upload()
        answers = [
            await server.client.post("/v1/fine_tuning/jobs", json={"model": "gpt2", "training_file": file})
            for _ in range(OPEN_MAX - 1)
        ]
        assert [answer.status_code for answer in answers] == [200] * (OPEN_MAX - 2) + [429]

    tell(story, running=False)


STRANGE = ('a"b', '"', "a'b", "a\\b", "a.b", "a]", "[0]", "$", "a b", "é天👍", "\n\t", "%", "_", "--", "{x}", "\x7f")


def test_metadata_is_found_whatever_its_names_hold(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        made = (await server.create(metadata={name: f"{name}!" for name in STRANGE}))["id"]
        await server.create(metadata={"other": "a"})
        for name in STRANGE:
            for value, wanted in ((f"{name}!", [made]), ("else", [])):
                found = await server.client.get("/v1/fine_tuning/jobs", params={f"metadata[{name}]": value})
                assert found.status_code == 200, (name, found.text)
                assert [job["id"] for job in found.json()["data"]] == wanted, name

    tell(story, running=False)


def test_auto_and_null_ask_for_nothing(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        method = {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": "auto", "batch_size": 2, "clip": None}},
        }
        made = await server.create(method=method, colour="red")
        assert made["method"] == {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2}}}
        assert made["hyperparameters"] == {"n_epochs": "auto", "batch_size": 2, "learning_rate_multiplier": "auto"}

    tell(story, running=False)


def test_what_nobody_knows_is_named(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        file = await server.upload()
        for method, named in (
            ({"hyperparameters": {"epochs": 3}}, "method.supervised.hyperparameters.epochs"),
            ({"lora": {"r": 8}}, "method.supervised.lora.r"),
        ):
            body = {"model": "gpt2", "training_file": file, "method": {"type": "supervised", "supervised": method}}
            answer = await server.client.post("/v1/fine_tuning/jobs", json=body)
            assert error_of(answer, 400)["message"] == f"Unknown parameter: '{named}'."
        whole = {"hyperparameters": {"n_epochs": 2.5}}
        body = {"model": "gpt2", "training_file": file, "method": {"type": "supervised", "supervised": whole}}
        answer = await server.client.post("/v1/fine_tuning/jobs", json=body)
        assert "expected an integer, but got a decimal" in error_of(answer, 400)["message"]
        body["method"] = {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate": 1e7}}}
        answer = await server.client.post("/v1/fine_tuning/jobs", json=body)
        assert "decimal above maximum value" in error_of(answer, 400)["message"]

    tell(story, running=False)


def test_preferences_are_a_method_with_a_beta(tell: Any) -> None:
    async def story(server: Tuned) -> None:
        method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5, "n_epochs": "auto", "batch_size": 2}}}
        body = {"model": "gpt2", "training_file": await server.upload(), "method": method}
        made = (await server.client.post("/v1/fine_tuning/jobs", json=body)).json()
        assert made["method"]["type"] == "dpo"
        await server.ended(made["id"])
        wanted = json.loads((server.directory / "jobs" / made["id"] / "job.json").read_text())
        assert (wanted["method"], wanted["dpo"], wanted["trainable"]) == ("dpo", {"beta": 0.5}, "lora")
        assert wanted["hyperparameters"]["batch_size"] == 2
        assert Path(wanted["base_name"]).is_dir()

    tell(story)
