"""Prints the `dev` dependency group of pyproject.toml, one requirement a line: pip installs no groups before 25.1."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))
sys.stdout.write("".join(f"{requirement}\n" for requirement in project["dependency-groups"]["dev"]))
