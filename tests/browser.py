"""Opens pages in a real browser, headless: what it logs, and how wide they become."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
WIDTHS = (390, 1400)  # a phone and a screen

# A frame of each width has the layout of a window of that width.
HARNESS = """<!doctype html><body>%s<pre id=found></pre><script>
onload = () => {
  const frames = [...document.querySelectorAll('iframe')].map(frame => {
    const root = frame.contentDocument.documentElement, inner = frame.contentWindow.innerWidth;
    const folded = [...root.querySelectorAll('details')];
    folded.forEach(one => { one.open = true; });  // what is folded must fit too
    return { width: inner, scroll_width: root.scrollWidth, folded: folded.length,
             text: root.innerText, scripts: root.querySelectorAll('script').length,
             heights: [...root.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height) };
  });
  document.getElementById('found').textContent = JSON.stringify(frames);
};
</script></body>"""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A page at one width, everything that can be folded unfolded."""

    width: int
    scroll_width: int  # of the whole page: larger than `width` where it has to be moved sideways
    folded: int
    text: str  # as a person sees it
    scripts: int  # elements
    heights: list[float]  # of its drawings


def open_page(page: Path, folder: Path, widths: Sequence[int] = WIDTHS) -> tuple[list[Opened], list[str]]:
    """The page at every width, and the lines that the browser wrote to its console."""
    frames = "".join(
        f"<iframe src='{page.as_uri()}' width={width} height=3000 frameborder=0></iframe>" for width in widths
    )
    harness = folder / "harness.html"
    harness.write_text(HARNESS % frames)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += ["--enable-logging=stderr", "--dump-dom", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *options, harness.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    (found,) = re.findall(r"<pre id=\"found\">(.*?)</pre>", done.stdout, re.DOTALL)
    texts = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    opened = [Opened(**{**frame, "heights": tuple(frame["heights"])}) for frame in texts]
    return opened, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
