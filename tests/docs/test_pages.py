"""What the pages say is so: every test that is named exists, and the tables of fields are those of the schemas."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_is_named_exists() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE), f"{path}::{name}"


def test_every_row_of_ours_names_a_test() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| feature"))]
    assert all(line.endswith("` |") for line in rows if line != "| client | our test |")


def test_the_tables_of_fields_are_those_of_the_schemas() -> None:
    """If this fails: python scripts/document_api.py"""
    page = ROOT / "docs" / "api.md"
    made = subprocess.run(
        [sys.executable, "scripts/document_api.py", "--print"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert made.stdout == page.read_text("utf-8")


def test_the_tables_of_commands_and_settings_are_those_of_the_program() -> None:
    """If this fails: python scripts/document_cli.py"""
    page = ROOT / "docs" / "cli.md"
    made = subprocess.run(
        [sys.executable, "scripts/document_cli.py", "--print"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert made.stdout == page.read_text("utf-8")


def test_the_tables_of_other_servers_fields_are_those_of_the_code() -> None:
    """If this fails: python scripts/document_clients.py"""
    page = ROOT / "docs" / "clients.md"
    command = [sys.executable, "scripts/document_clients.py", "--print"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout == page.read_text("utf-8")


def test_the_tables_of_metrics_and_alerts_are_those_of_the_code() -> None:
    """If this fails: python scripts/document_metrics.py"""
    page = ROOT / "docs" / "observability.md"
    command = [sys.executable, "scripts/document_metrics.py", "--print"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout == page.read_text("utf-8")


def test_every_alert_has_a_paragraph() -> None:
    alerts = re.findall(r"^      - alert: (\w+)$", (ROOT / "docker" / "alerts.yml").read_text("utf-8"), re.MULTILINE)
    told = re.findall(r"^### (\w+)$", (ROOT / "docs" / "operations.md").read_text("utf-8"), re.MULTILINE)
    assert told == alerts
