"""The fenced blocks of the pages: what they say, and what is said of running them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *ROOT.glob("docs/**/*.md"),
     *ROOT.glob("docker/**/*.md"), ROOT / "model" / "default" / "README.md"]
)  # fmt: skip
SHELL, CONSOLE, PYTHON = ("sh", "bash"), ("console",), ("python",)
MARK = r"(?:^ *<!-- (?P<mark>(?:not run|run with): [^>\n]*) -->\n)?"
FENCE = re.compile(rf"{MARK}^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
REASONS = {  # why a block may be left alone, and what must stand in it then
    "needs docker": r"\bdocker\b|\bcompose\b",
    "needs a GPU": r"cuda|gpu",
    "needs the network": r"pip install|git clone|npx?\b|fetch|[\w-]+/[\w.-]*gpt|\bgpt2(-medium|-large|-xl)?\b(?!-)",
    "needs what it names": r"\b[A-Z][A-Z_]{2,}\b|path/to|\.\.\.|…",
    "needs a cluster": r"\bray\b|\bserve (run|deploy)\b|kubectl|helm",
    "changes the machine": r"apt-get|systemctl|sudo|sysctl|ulimit|docker",
    "takes minutes": r"make (test|soak|lint|bench|dev)|\.ci/run|pytest|bench|model\.training|fine-tune|distill",
}
ENDS_A_COMMAND = {"|", "||", "&", "&&", ";", ">", "2>", ">>", "<", "2>&1", ")", "`"}


@dataclass(frozen=True, slots=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    mark: str  # "not run: REASON", "run with: REQUIREMENT", or nothing

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else None

    @property
    def requirement(self) -> str | None:
        """The package that it needs, in an environment of its own."""
        return self.mark.removeprefix("run with: ") if self.mark.startswith("run with: ") else None

    @property
    def commands(self) -> str:
        """What a shell is to run: of a console's text, the lines after a prompt."""
        if self.language in CONSOLE:
            return "".join(line[2:] + "\n" for line in self.text.splitlines() if line.startswith(("$ ", "> ")))
        return self.text if self.language in SHELL else ""

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of each call of a program."""
        found = []
        for line in self.commands.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a line of a here-document
                continue
            for at, word in enumerate(words):
                if word.rpartition("/")[2] == program:
                    rest = words[at + 1 :]
                    found.append(rest[: next((i for i, each in enumerate(rest) if each in ENDS_A_COMMAND), len(rest))])
        return found


def read_blocks() -> list[Block]:
    blocks = []
    for path in PAGES:
        page = path.read_text("utf-8")
        for found in FENCE.finditer(page):
            line = page.count("\n", 0, found.start("text"))
            name = path.relative_to(ROOT).as_posix()
            blocks.append(Block(name, line, found["language"], dedent(found["text"]), found["mark"] or ""))
    return blocks
