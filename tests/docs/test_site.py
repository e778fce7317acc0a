"""The site builds: a warning, such as a link that leads nowhere, is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")


class Loaded(HTMLParser):
    """What a page makes a browser load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        loads = {"script": "src", "img": "src", "link": "href"}.get(tag)
        address = given.get(loads) if loads and given.get("rel") not in ("canonical", "next", "prev") else None
        if address and address.startswith(("http:", "https:", "//")):
            self.addresses.append(address)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 25
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.addresses == [], page
    assert "FeatureStore" in (tmp_path / "site/api/featurestore.html").read_text()
    assert 'id="extraction"' in (tmp_path / "site/measurements.html").read_text()
    assert 'href="measurements.html#extraction"' in (tmp_path / "site/extraction.html").read_text()
    assert 'href="notebooks/ablate.html"' in (tmp_path / "site/python.html").read_text()
    assert 'href="ablate.ipynb"' in (tmp_path / "site/notebooks/ablate.html").read_text()
    assert (tmp_path / "site/llms.txt").read_text() == (ROOT / "docs/llms.txt").read_text()
