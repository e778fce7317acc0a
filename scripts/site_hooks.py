"""Hooks of the site: pages that include a file of the repository, with its links as links between pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:]+)\)")
PAGES = {  # files of the repository -> their pages
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "jobs/README.md": "clusters.md",
    "benchmarks/README.md": "measurements.md",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return INCLUDE.sub(lambda match: included(match[1]), markdown)


def included(file: str) -> str:
    """The text of a file; a link to what is no page keeps its text alone."""

    def linked(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        if not path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        page = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        return f"[{match[1]}]({page}{'#' + anchor if anchor else ''})" if page else match[1]

    return LINK.sub(linked, (ROOT / file).read_text())
