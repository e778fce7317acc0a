"""Hooks of the site: pages that include a file of the repository, with its links as links between pages.

A notebook is included with the outputs that are saved in it.
"""

from __future__ import annotations

import html
import json
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
    if file.endswith(".ipynb"):
        return notebook(json.loads((ROOT / file).read_text()))

    def linked(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        if not path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        page = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        return f"[{match[1]}]({page}{'#' + anchor if anchor else ''})" if page else match[1]

    return LINK.sub(linked, (ROOT / file).read_text())


def notebook(content: dict[str, Any]) -> str:
    """The cells of a notebook as Markdown, each code cell followed by its outputs."""
    parts = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    """The richest form of an output that a page can show."""
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="output of the cell above" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/html" in data:
        return "<div>" + "".join(data["text/html"]).replace("\n", " ") + "</div>"
    return f"<pre>{html.escape(''.join(output.get('text') or data.get('text/plain', '')))}</pre>"
