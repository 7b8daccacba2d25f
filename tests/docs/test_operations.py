"""SECURITY.md and docs/operations.md say what is so."""

from __future__ import annotations

import re
from pathlib import Path

from model.training.finetune import EXIT_STOPPED, FAILURES
from server.commands.complete import INTERRUPTED
from server.engine.supervisor import EXIT_ENGINE_DIED
from server.settings import Settings
from server.worker.__main__ import EXIT_CONFIG

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text("utf-8")


def test_the_limits_are_those_of_the_settings() -> None:
    rows = re.findall(r"^\| .+ \| (.+) \| `(\w+)` \|$", SECURITY, re.MULTILINE)
    shown = {name: default for default, name in rows}
    for name, default in shown.items():
        value = Settings.model_fields[name].default
        assert default == str(value) or (value is None and not default.isdigit()), name
    bounds = {name for name in Settings.model_fields if name.startswith("max_") or name.endswith("_timeout")}
    assert bounds - shown.keys() == {"max_num_batched_tokens"}  # how work is cut, not how much is let in


def test_every_alert_has_its_paragraph_and_no_paragraph_is_left_over() -> None:
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "docker" / "alerts.yml").read_text("utf-8"))
    assert re.findall(r"^### (\w+)$", OPERATIONS, re.MULTILINE) == alerts
    paragraphs = re.split(r"^### \w+$", OPERATIONS, flags=re.MULTILINE)[1:]
    assert all(len(paragraph.strip()) > 100 for paragraph in paragraphs)


def test_the_exit_statuses_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \|", OPERATIONS, re.MULTILINE)
    assert set(rows) == {"0", "1", str(EXIT_ENGINE_DIED), str(EXIT_CONFIG)}


def test_the_exit_statuses_of_commands_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    rows = {int(each) for each in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    trainer = {status for _, _, status in FAILURES} | {EXIT_STOPPED}
    assert rows == trainer | {0, 1, 2, EXIT_ENGINE_DIED, EXIT_CONFIG, INTERRUPTED}


def test_every_flag_and_setting_that_is_named_exists() -> None:
    flags = {name.replace("_", "-") for name in Settings.model_fields} | {"ready", "config"}
    for page in (OPERATIONS, SECURITY):
        for name in re.findall(r"`--([a-z-]+)", page):
            assert name in flags, name
    metrics = (ROOT / "server" / "metrics.py").read_text("utf-8")
    for name in re.findall(r"`gpt2_(\w+)`", OPERATIONS):
        assert f'"{name.removesuffix("_total")}"' in metrics, name


def test_every_link_leads_somewhere() -> None:
    for page, at in ((OPERATIONS, ROOT / "docs"), (SECURITY, ROOT)):
        for link in re.findall(r"\]\(([^)#]+)\)", page):
            assert (at / link).exists(), link
