"""Fenced code blocks of the README and of the pages under docs/."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "jobs/README.md", "benchmarks/README.md"]
    + [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
)
RUN, NOT_RUN = "<!-- run -->", "<!-- not run:"  # on the line before a fence
PROGRAMS = ("merv-pipeline", "merv-train", "merv-eval")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block: `line` is that of its first line of code, counted from 1."""

    page: str
    line: int
    language: str
    code: str
    mark: str  # the comment before it, if there is one

    @property
    def runs(self) -> bool:
        """Python runs unless it is marked, shell commands only if they are."""
        return not self.mark.startswith(NOT_RUN) if self.language == "python" else self.mark == RUN

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line that calls one of our programs, without comments and redirections."""
        lines = [shlex.split(line, comments=True) for line in self.code.splitlines() if line.startswith(PROGRAMS)]
        return [list(takewhile(lambda word: word not in (">", "2>"), line)) for line in lines]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    blocks, lines = [], (ROOT / page).read_text().splitlines()
    number = 0
    while number < len(lines):
        opened = re.fullmatch(r"(```+)(\w*).*", lines[number])
        if opened:
            end = lines.index(opened[1], number + 1)
            mark = lines[number - 1] if number and lines[number - 1].startswith("<!--") else ""
            code = "\n".join(lines[number + 1 : end]) + "\n"
            blocks.append(Block(page=page, line=number + 2, language=opened[2], code=code, mark=mark))
            number = end
        number += 1
    return blocks
