"""Hooks of the site: files of the repository as pages, and links to these files as links to their pages.

The pages do not exist in the repository: there, a link leads to the file itself. A notebook is shown with the outputs
that are saved in it.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:]+)\)")
FILES = {  # pages of the site -> files of the repository, which are their text
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "clusters.md": "jobs/README.md",
    "measurements.md": "benchmarks/README.md",
    "notebooks/ablate.md": "docs/notebooks/ablate.ipynb",
    "notebooks/own-videos.md": "docs/notebooks/own-videos.ipynb",
    "notebooks/train-and-ask.md": "docs/notebooks/train-and-ask.ipynb",
}
PAGES = {file: page for page, file in FILES.items()} | {"README.md": "index.md"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of files; called by mkdocs before it reads the navigation."""
    for page, file in FILES.items():
        files.append(File.generated(config, page, content=page_text(file)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Rewrite the links of a page; called by mkdocs for every page."""
    uri = page.file.src_uri
    return with_links_to_pages(markdown, uri, FILES.get(uri, f"docs/{uri}"))


def with_links_to_pages(markdown: str, page: str, file: str) -> str:
    """The text of `file` for `page`; a link to what is neither page nor below docs/ keeps its text alone."""

    def linked(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        if not path or target == file:  # within the page, or from the page of a notebook to the notebook
            return match[0]
        to = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if not to:
            return match[1]
        return f"[{match[1]}]({posixpath.relpath(to, posixpath.dirname(page))}{'#' + anchor if anchor else ''})"

    return LINK.sub(linked, markdown)


def page_text(file: str) -> str:
    """The text of a file of the repository as Markdown; that of a notebook ends in a link to it."""
    text = (ROOT / file).read_text()
    if not file.endswith(".ipynb"):
        return text
    return f"{notebook(json.loads(text))}\n[The notebook]({posixpath.basename(file)}) as a file.\n"


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
