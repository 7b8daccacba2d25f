"""B3: what hurt other servers, by the number under which it was published, as far as it can touch this one.

What another test holds already is in HELD, by that test's name. The rest is held here.
"""

from __future__ import annotations

import ast
import asyncio
import json
import math
import random
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import pytest
from asking import Api, error_of, make_api
from packaging.requirements import Requirement
from packaging.version import Version
from scripted import VOCAB_SIZE
from starlette.routing import Route

from model.config import read_config
from server.api.keys import Key, Keyring, key_digest
from server.api.schemas import CompletionBody
from server.engine import grammars

ROOT = Path(__file__).parents[2]
EDGES, START, STRUCTURED = (
    "tests/faults/test_edges.py",
    "tests/faults/test_start.py",
    "tests/service/test_structured.py",
)
SERVICE, WORKERS = "tests/api/test_traps_of_service.py", "tests/faults/test_worker_faults.py"
HOSTILE_GRAMMARS = f"{STRUCTURED}::test_hostile_grammars_are_refused_within_a_second_and_disturb_nobody"
SAME_BYTES = "tests/worker/test_same_bytes.py::test_a_request_gets_among_31_strangers_what_it_gets_alone"
BAD_CHECKPOINT = f"{START}::test_a_checkpoint_that_cannot_be_served"
ERRORS_FUZZED = "tests/fuzz/test_hostile_requests.py::test_b1_b4_two_thousand_hostile_requests"
HELD = {
    "CVE-2025-48956": f"{EDGES}::test_a_large_head_is_refused",
    "CVE-2026-55646": f"{EDGES}::test_a_large_body_is_refused_before_it_is_read",
    "CVE-2025-33201": f"{EDGES}::test_a_large_body_is_refused_before_it_is_read",
    "CVE-2025-23310": f"{EDGES}::test_a_body_may_come_in_chunks_of_any_size",
    "CVE-2025-23311": f"{EDGES}::test_a_body_may_come_in_chunks_of_any_size",
    "CVE-2026-44223": "tests/service/test_engine.py::test_prompt_lookup_and_target_itl_change_no_answer",
    "CVE-2026-55514": f"{WORKERS}::test_what_kills_workers_fails_alone",
    "CVE-2026-22773": f"{WORKERS}::test_what_kills_workers_fails_alone",
    "CVE-2026-73555": ERRORS_FUZZED,
    "CVE-2026-22778": ERRORS_FUZZED,
    "CVE-2026-54236": ERRORS_FUZZED,
    "CVE-2025-23319": ERRORS_FUZZED,
    "CVE-2025-24357": BAD_CHECKPOINT,
    "CVE-2025-32434": BAD_CHECKPOINT,
    "CVE-2025-62164": f"{SERVICE}::test_28_what_we_know_and_do_not_honour_is_refused_by_name",
    "GHSA-j828-28rj-hfhp": f"{STRUCTURED}::test_what_would_take_a_backtracker_for_ever_takes_no_time",
    "CVE-2025-48887": f"{STRUCTURED}::test_what_would_take_a_backtracker_for_ever_takes_no_time",
    "CVE-2025-48942": HOSTILE_GRAMMARS,
    "CVE-2025-48943": HOSTILE_GRAMMARS,
    "CVE-2025-48944": HOSTILE_GRAMMARS,
    "CVE-2025-57809": HOSTILE_GRAMMARS,
    "CVE-2025-58446": HOSTILE_GRAMMARS,
    "CVE-2026-25048": HOSTILE_GRAMMARS,
    "CVE-2026-55574": HOSTILE_GRAMMARS,
    "CVE-2026-73556": "tests/unit/test_grammar_checker.py::test_harm_ends_with_the_fork",
    "CVE-2025-25183": "tests/unit/test_block_pool.py::test_a_collision_of_digests_is_a_miss",
    "CVE-2025-46570": "tests/api/test_streams.py::test_salts_divide_the_cache_by_key_and_by_wish",
    "CVE-2026-73558": SAME_BYTES,
    "CVE-2026-53923": SAME_BYTES,
    "CVE-2026-9540": "tests/faults/test_drain.py::test_f1_while_it_drains_it_refuses_new_work_and_finishes_the_old",
    "CVE-2025-52566": "tests/model/test_tokenizer.py::test_ids_are_those_of_hugging_face",
}


def test_every_test_that_is_named_exists() -> None:
    for number, held in HELD.items():
        path, name = held.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE), f"{number}: {held}"


@pytest.mark.parametrize("prompt", ["", [], [[]], [[], []], [""], ["", ""], None], ids=repr)
def test_cve_2024_8768_an_empty_prompt(prompt: Any, api: Api) -> None:
    response = api.post(prompt=prompt)
    if prompt in ([], [[]], [[], []]):
        error_of(response, 400)
    else:
        assert response.status_code == 200


@pytest.mark.parametrize("fields", [
    {"n": 2**31}, {"n": 129}, {"best_of": 2**40}, {"n": 128, "prompt": ["a"] * 128}, {"n": 10**400}, {"n": -1},
    {"best_of": 20, "n": 1, "prompt": ["a"] * 100}, {"prompt": ["a"] * 100_000},
], ids=str)  # fmt: skip
def test_cve_2024_8939_cve_2026_34756_many_choices_are_counted_before_anything_is_made(
    fields: dict[str, Any], api: Api
) -> None:
    began = time.perf_counter()
    error_of(api.post(**{"prompt": "a", **fields}), 400)
    assert time.perf_counter() - began < 1
    assert not api.engine.requests


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_vllm_264_minus_one_logprobs_are_not_the_whole_vocabulary(name: str, api: Api) -> None:
    for value in (-1, 21, 50257):
        assert api.error(prompt="a", **{name: value})["param"] == name


@pytest.mark.parametrize("name", ["prompt", "stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 2**31, 2**63, 10**30])
def test_vllm_16529_vllm_54196_ids_outside_the_vocabulary(name: str, token: int, api: Api) -> None:
    assert api.error(**{"prompt": "a", name: [1, token]})["param"] == name
    assert api.error(prompt="a", logit_bias={str(token): 1})["param"] == "logit_bias"


NUMBERS = [name for name, field in CompletionBody.model_fields.items() if field.annotation in (int, float, int | None)]


@pytest.mark.parametrize("name", NUMBERS)
def test_cve_2026_54235_cve_2026_21869_numbers_that_are_none_or_out_of_range(name: str, api: Api) -> None:
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "-" + "9" * 400):
        raw = f'{{"prompt": "a", "{name}": {value}}}'
        error_of(api.client.post("/v1/completions", content=raw), 400)
    huge = api.post(prompt="a", **{name: -(2.0**53) if name not in ("seed", "priority") else 2**64})
    error_of(huge, 400)
    assert not api.engine.requests


def routes(api: Api) -> Iterator[tuple[str, str]]:
    document = api.client.get("/openapi.json", headers={"authorization": "Bearer sk-right"}).json()
    for path, methods in document["paths"].items():
        for method in methods:
            yield method.upper(), re.sub(r"{\w+}", "gpt2", path)
    yield from (("GET", "/openapi.json"), ("GET", "/nowhere"), ("POST", "/completions"), ("TRACE", "/v1/models"))
    assert all(not isinstance(route, Route) or route.path == "/openapi.json" for route in api.client.app.routes)


def test_cve_2026_48746_cve_2026_48710_every_route_but_two_asks_for_a_key() -> None:
    """Also where a Host header pretends that the path is another."""
    api = make_api(keys={"a": "sk-right"}, playground=False)
    asked = list(routes(api))
    assert len(asked) > 20
    for method, path in asked:
        for host in ("testserver", "x/health?", "x/ready?a=", "/health#", "x:80/ready"):
            for headers in ({}, {"authorization": "Bearer sk-wrong"}, {"x-api-key": "sk-righ"}):
                response = api.client.request(method, path, headers={**headers, "host": host})
                assert response.status_code == (200 if path in ("/health", "/ready") else 401), (method, path, host)
    assert not api.engine.requests


def test_cve_2025_59425_the_time_a_key_takes_tells_nothing_of_it() -> None:
    """B5: Welch's t between a key that is wrong in its first byte and one that is wrong in its last."""
    right = "sk-" + "a" * 61
    ring = Keyring([Key(str(i), key_digest(f"{i}" * 64)) for i in range(4)] + [Key("a", key_digest(right))])
    wrong = (f"x{right[1:]}".encode(), f"{right[:-1]}x".encode())
    drawn = random.Random(5)
    t = min(
        abs(welch(*times(ring, wrong, drawn))) for _ in range(4)
    )  # a neighbour disturbs a run, not what a key takes
    assert t < 4


def times(ring: Keyring, keys: tuple[bytes, bytes], drawn: random.Random) -> tuple[list[int], list[int]]:
    taken: tuple[list[int], list[int]] = ([], [])
    for _ in range(40_000):
        which = drawn.getrandbits(1)  # in no order: whatever comes at intervals must meet both alike
        began = time.perf_counter_ns()
        ring.find(keys[which])
        taken[which].append(time.perf_counter_ns() - began)
    return taken


def welch(first: list[int], second: list[int]) -> float:
    """Without the slowest twentieth of each, which are interruptions."""
    kept = [sorted(each)[: len(each) * 19 // 20] for each in (first, second)]
    means = [sum(each) / len(each) for each in kept]
    variances = [sum((x - mean) ** 2 for x in each) / (len(each) - 1) for each, mean in zip(kept, means, strict=True)]
    return (means[0] - means[1]) / math.sqrt(sum(v / len(each) for v, each in zip(variances, kept, strict=True)))


PICKLES = ROOT / "model" / "conversion" / "pickles.py"  # reads pickled checkpoints, in a confined process


def sources() -> list[Path]:
    return [*(ROOT / "server").rglob("*.py"), *(ROOT / "model").rglob("*.py")]


def imported(paths: list[Path]) -> set[str]:
    """Top-level modules that these files import, wherever they do."""
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def called(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]


def test_cve_2024_9052_cve_2025_32444_cve_2025_47277_cve_2025_30165_cve_2026_3059_nothing_is_pickled() -> None:
    """And CVE-2024-9053, -11041, CVE-2025-29783, -10164, CVE-2026-3060, -7301, -7304: there is no such module here."""
    others = [path for path in sources() if path != PICKLES]
    assert not imported(others) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "zmq"}
    dangerous = {"eval", "exec", "torch.load", "torch.save", "__import__", "os.system"}
    found = [path.name for path in others for call in called(path) if ast.unparse(call.func) in dangerous]
    assert found == ["exporting.py"]  # writes nanoGPT's ckpt.pt, the only form that nanoGPT reads


def test_a_pickled_checkpoint_is_opened_for_its_tensors_alone() -> None:
    text = PICKLES.read_text("utf-8")
    assert set(re.findall(r"pickle\.(\w+)", text)) == {"UnpicklingError"}
    (load,) = (call for call in called(PICKLES) if ast.unparse(call.func) == "torch.load")
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}["weights_only"] == "True"


def test_cve_2024_11393_cve_2026_1839_cve_2025_67221_no_transformers_no_orjson_at_run_time() -> None:
    assert not imported(sources()) & {"transformers", "orjson", "requests", "multipart", "yaml"}


def test_cve_2025_66448_cve_2026_22807_cve_2026_27893_a_config_is_data(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8}
    config |= {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 0, "auto_map": {"AutoConfig": "evil.Evil"}}
    config |= {"trust_remote_code": True, "architectures": ["os.system"], "vision_config": {"auto_map": {"a": "b--c"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    assert read_config(tmp_path).n_layer == 1
    assert "evil" not in sys.modules


def test_cve_2026_41523_without_asserts_nothing_more_is_let_in() -> None:
    """`python -O` takes asserts away: what checks a client must not be one."""
    script = """
import json, sys
from server.api.limits import Limits
from server.api.parsing import parse_completion
from server.errors import InvalidRequest
assert False, "asserts are on"
for body in json.loads(sys.stdin.read()):
    try:
        parse_completion(json.dumps(body).encode(), Limits(max_model_len=64, vocab_size=301))
        print("let in", body)
    except InvalidRequest:
        pass
"""
    wrong = [{"n": 0}, {"n": 2**40}, {"logprobs": -1}, {"temperature": -1}, {"prompt": [301]}, {"prompt": [-1]}, []]
    wrong += [{"stop": [""]}, {"logit_bias": {"301": 1}}, {"stop_token_ids": [-1]}, {"max_tokens": -1}, {"prompt": []}]
    command = [sys.executable, "-O", "-c", script]
    ran = subprocess.run(command, input=json.dumps(wrong), cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == ""


SEEN: list[tuple[str, str]] = []
WATCHING: list[bool] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHING and event in {"open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"}:
        SEEN.append((event, str(arguments[:2])))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """What this process opens, connects to and starts meanwhile."""
    if watch.__name__ not in vars(sys):
        vars(sys)[watch.__name__] = True  # an audit hook stays for good
        sys.addaudithook(watch)
    SEEN.clear()
    WATCHING.append(True)
    try:
        yield SEEN
    finally:
        WATCHING.clear()


TEXT_FIELDS = ("model", "prompt", "user", "suffix", "stop", "cache_salt", "request_id", "lora_request", "prompt_embeds")
PLACES = [
    "../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://169.254.169.254/latest",
    "//x/y",
    "C:\\x",
    "~",
]


@pytest.mark.parametrize("place", PLACES)
def test_cve_2026_7302_cve_2026_35483_cve_2026_0599_cve_2026_24779_no_field_is_a_path_or_an_address(
    place: str, api: Api
) -> None:
    """And CVE-2026-34753, -35050, -9856, CVE-2023-29159: nothing is opened, nobody is called, whatever a field says."""
    with watched() as seen:
        for name in TEXT_FIELDS:
            assert api.post(**{"prompt": "a", name: place}).status_code < 500
        error_of(api.post(prompt="a", model=place), 404)
        error_of(api.post(f"/v1/engines/{place}/completions", prompt="a"), 404)
        assert api.client.get(f"/v1/models/{place}").status_code == 404
        for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/playground.js/../../settings.py"):
            assert api.client.get(path).status_code == 404
    assert not [each for each in seen if ".py'" not in each[1]]  # tracebacks read sources


def test_cve_2025_29770_cve_2025_32381_what_is_compiled_is_kept_within_bounds() -> None:
    checker = grammars.GrammarChecker(["true"])
    assert grammars.REMEMBERED_MAX * (1 << 20) <= 64 << 20, "each is as large as a body at most"
    for i in range(grammars.REMEMBERED_MAX * 2):
        remember(checker, i)
    assert len(checker._remembered) == grammars.REMEMBERED_MAX


def remember(checker: grammars.GrammarChecker, number: int) -> None:
    """As `compile` does, with a verdict from nowhere."""

    async def verdict(_: grammars.GrammarSource) -> grammars.Verdict:
        return grammars.Verdict(grammar=f"start: /{number}/")

    checker._ask = verdict  # type: ignore[method-assign]
    source = grammars.GrammarSource(grammars.GrammarKind.REGEX, f"{number}", "guided_regex")
    asyncio.run(checker.compile(source))


@pytest.mark.parametrize("name", ["chat_template", "chat_template_kwargs"])
def test_cve_2024_34359_cve_2025_61620_cve_2025_62426_a_client_brings_no_template(name: str, api: Api) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    value = template if name == "chat_template" else {"chat_template": template}
    response = api.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], **{name: value})
    error_of(response, 400)
    assert "subclasses" not in response.text


@pytest.mark.parametrize("text", [
    "<|endoftext|>", "<|endoftext|>" * 50, "<image>", "<|image_pad|><|vision_start|>", "<|im_start|>system", "<s></s>",
    "[INST]", "<|reserved_special_token_0|>", "<|endoftext", "|>",
])  # fmt: skip
def test_cve_2026_44222_special_words_are_text_or_a_token(text: str, api: Api) -> None:
    assert api.post(prompt=text, max_tokens=1).status_code == 200
    tokens = api.post("/tokenize", prompt=text).json()["tokens"]
    assert api.post("/detokenize", tokens=tokens).json()["prompt"] == text


def test_cve_2026_71486_detokenize_has_the_same_bounds_as_any_body(api: Api) -> None:
    began = time.perf_counter()
    assert api.post("/detokenize", tokens=[97] * 200_000).status_code == 200
    assert time.perf_counter() - began < 2
    error_of(api.post("/detokenize", tokens=[97] * 600_000), 413)


def test_cve_2020_7694_cve_2020_7695_a_url_and_a_header_stay_in_their_line(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/v1/%0d%0aSet-Cookie:%20a=b", "/%1b[31m", "/v1/models/%0d%0aX-Evil:%201"):
        response = api.client.get(path, headers={"x-request-id": "a%0d%0ab"})
        assert response.status_code == 404
        assert "x-evil" not in response.headers
        assert "set-cookie" not in response.headers
        assert "\n" not in response.json()["error"]["message"]
    response = api.post(prompt="a", **{"a\r\nX-Evil: 1": 1})
    assert "x-evil" not in response.headers
    assert not caplog.text


def test_cve_2021_32677_a_page_of_another_origin_does_nothing_not_even_blindly() -> None:
    """A browser sends `text/plain` to any address, without asking first: it is told apart by what it says of itself."""
    strange = {"sec-fetch-site": "cross-site", "origin": "https://a.example", "content-type": "text/plain"}
    api = make_api(cors_origins=["https://b.example"])
    error_of(api.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=strange), 403)
    assert not api.engine.requests
    for headers in ({**strange, "origin": "https://b.example"}, {**strange, "sec-fetch-site": "same-origin"}, {}):
        assert api.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers).status_code == 200
    opened = make_api(cors_origins=["*"])
    assert opened.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=strange).status_code == 200


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "text/plain"])
def test_cve_2024_53981_cve_2026_53539_cve_2026_40347_forms_are_not_read(kind: str, api: Api) -> None:
    """And CVE-2026-24486, -42561, CVE-2024-47874: no parser of forms is here. A body is JSON whatever it is called."""
    form = b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\na\r\n--x--\r\n"
    error_of(api.client.post("/v1/completions", content=form, headers={"content-type": kind}), 400)


def test_cve_2025_54121_cve_2025_62727_cve_2026_48817_no_files_no_ranges(api: Api) -> None:
    api = make_api(playground=True)
    response = api.client.get("/playground.js", headers={"range": "bytes=" + "0-1," * 5000 + "5-6"})
    assert response.status_code == 200
    assert "content-range" not in response.headers


FLOORS = {
    "h11": ("0.16", "CVE-2025-43859"),
    "starlette": ("1.0.1", "CVE-2026-48710, CVE-2024-47874, CVE-2025-54121, CVE-2025-62727"),
    "torch": ("2.6", "CVE-2025-32434"),
    "python-multipart": ("0.0.30", "CVE-2026-53539, CVE-2026-42561, CVE-2026-24486, CVE-2024-53981"),
    "tiktoken": ("0.13", "quadratic time for one long word"),
}


def test_cve_2025_43859_cve_2026_48710_floors_of_what_we_stand_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    required = {each.name: each for each in map(Requirement, project["dependencies"])}
    for name, (floor, why) in FLOORS.items():
        bounds = [Version(spec.version) for spec in required[name].specifier if spec.operator in (">=", "==")]
        assert bounds, why
        assert max(bounds) >= Version(floor), why
        assert Version(version(name)) >= Version(floor), why
    assert "orjson" not in required
    with pytest.raises(PackageNotFoundError):
        distribution("orjson")


def test_cve_2026_54232_packages_come_from_one_index() -> None:
    """Two indexes are how a stranger's package takes the place of one's own."""
    files = [path for name in ("Makefile", "pyproject.toml", "docker", "scripts", ".ci") for path in tree(ROOT / name)]
    assert files
    assert not [path for path in files if "extra-index-url" in path.read_text("utf-8", "replace")]


def tree(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
