"""Where a setting comes from: a flag, a variable, a file; and which variables are nobody's setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import SettingsError
from server.settings import RETIRED_MODELS, Settings, parse


@pytest.mark.parametrize(
    ("text", "words"),
    [("foo", ["foo"]), ("foo, bar", ["foo", "bar"]), ('["foo", "b,r"]', ["foo", "b,r"]), ("[]", [])],
)
def test_a_list_in_a_variable_is_json_or_words_between_commas(
    text: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2_SERVER_ALIAS", text)
    assert parse([]).alias == words


@pytest.mark.parametrize("text", ["{}", "7", '[{"a": 1}]', "null"])
def test_a_list_that_is_another_thing_is_refused_in_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_SERVER_ALIAS", text)
    with pytest.raises(SettingsError, match=r"^setting alias[.\d]*: input should be a valid [^\n]*$"):
        parse([])


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 9\n")
    for name in [*Settings.model_fields, "no_such_setting"]:
        monkeypatch.setenv(f"GPT2_SERVER_{name.upper()}", "")
    settings = parse(["--config", str(file)])
    assert settings == Settings(port=9)
    assert settings.alias == list(RETIRED_MODELS)
    assert (settings.api_key, settings.model) == (None, None)


def test_a_flag_overrules_a_variable_that_could_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_SERVER_PORT", "http")
    monkeypatch.setenv("GPT2_SERVER_SPECULATIVE_METHOD", "model")  # needs a model, which a flag may name
    assert parse(["--port", "7", "--speculative-model", "x"]).port == 7
    with pytest.raises(SettingsError, match="setting port: input should be a valid integer"):
        parse(["--speculative-model", "x"])


SERVICES = {  # as a pod sees them, of three Services: gpt2-server, gpt2-server-metrics and gpt2-server-2
    "SERVICE_HOST": "10.0.171.239",
    "SERVICE_PORT": "8000",
    "SERVICE_PORT_HTTP": "8000",
    "PORT": "tcp://10.0.171.239:8000",
    "PORT_8000_TCP": "tcp://10.0.171.239:8000",
    "PORT_8000_TCP_PROTO": "tcp",
    "PORT_8000_TCP_PORT": "8000",
    "PORT_8000_TCP_ADDR": "10.0.171.239",
    "PORT_53_UDP": "udp://10.0.171.239:53",
    "METRICS_SERVICE_HOST": "fd00::1",
    "METRICS_SERVICE_PORT_WEB": "9090",
    "METRICS_PORT": "tcp://[fd00::1]:9090",
    "METRICS_PORT_9090_TCP_ADDR": "fd00::1",
    "2_SERVICE_HOST": "10.0.0.9",
    "2_PORT_7_SCTP_PROTO": "sctp",
}


def test_the_service_links_of_kubernetes_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICES.items():
        monkeypatch.setenv(f"GPT2_SERVER_{name}", value)
    assert parse([]) == Settings()
    monkeypatch.setenv("GPT2_SERVER_PORT", "9")
    assert parse([]).port == 9


@pytest.mark.parametrize("name", ["PROT", "PORTS", "SERVICE", "PORT_8000"])
def test_other_names_with_the_prefix_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"GPT2_SERVER_{name}", "1")
    with pytest.raises(SettingsError, match=f"GPT2_SERVER_{name} is no setting"):
        parse([])
