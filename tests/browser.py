"""Opens pages in a real browser, headless: what it logs, how wide they become, and what they do when used."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
WIDTHS = (390, 1400)  # a phone and a screen

# A frame of each width has the layout of a window of that width.
HARNESS = """<!doctype html><body>%s<pre id=found></pre><script>
const ready = %s;
onload = () => {
  const open = [...document.querySelectorAll('iframe')].filter(frame => !frame.contentDocument.querySelector(ready));
  if (open.length) { setTimeout(onload, 50); return; }
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

DRIVER = """<!doctype html><body><iframe src='%s' width=%d height=844 frameborder=0></iframe>
<pre id=found></pre><script>
const until = async test => {
  for (;;) {
    const found = test();
    if (found) return found;
    await new Promise(done => setTimeout(done, 20));
  }
};
const deep = (root, selector) => [...root.querySelectorAll(selector), ...[...root.querySelectorAll('*')].flatMap(
  element => element.shadowRoot ? deep(element.shadowRoot, selector) : [])];
onload = async () => {
  const page = document.querySelector('iframe').contentWindow;
  const $ = selector => page.document.querySelector(selector);
  const all = selector => deep(page.document, selector);
  await until(() => $(%s));
  document.getElementById('found').textContent = JSON.stringify(await (async () => { %s })());
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


def open_page(
    page: Path, folder: Path, widths: Sequence[int] = WIDTHS, ready: str = "body"
) -> tuple[list[Opened], list[str]]:
    """The page at every width, and the lines that the browser wrote to its console.

    `ready` selects an element that a page with scripts has once it is drawn.
    """
    frames = "".join(
        f"<iframe src='{page.as_uri()}' width={width} height=3000 frameborder=0></iframe>" for width in widths
    )
    harness = folder / "harness.html"
    harness.write_text(HARNESS % (frames, json.dumps(ready)))
    texts, lines = _found(harness, folder)
    return [Opened(**{**frame, "heights": tuple(frame["heights"])}) for frame in texts], lines


def drive_page(page: Path, folder: Path, script: str, *, width: int = 1400, ready: str = "body") -> Any:
    """What a script returns that acts on the page as a person does, once there is an element `ready`.

    It may use `page`, the page's window; `$`, its `querySelector`; `all`, the elements of a
    selector, also those within Bokeh's figures; and `await until(test)`.
    """
    harness = folder / "driver.html"
    harness.write_text(DRIVER % (page.as_uri(), width, json.dumps(ready), script))
    return _found(harness, folder)[0]


def _found(harness: Path, folder: Path) -> tuple[Any, list[str]]:
    """The JSON that the scripts of a page leave in it, and the lines of the console."""
    document, lines = read_page(harness.as_uri(), folder)
    (found,) = re.findall(r"<pre id=\"found\">(.*?)</pre>", document, re.DOTALL)
    assert found, f"the page's scripts did not come to an end: {lines}"
    return json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), lines


def read_page(url: str, folder: Path) -> tuple[str, list[str]]:
    """The page's HTML after its scripts have run, and the lines that the browser wrote to its console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += ["--enable-logging=stderr", "--dump-dom", f"--user-data-dir={folder / 'profile'}"]
    options += ["--virtual-time-budget=60000"]  # scripts and their timers run until it has passed
    done = subprocess.run([BROWSER, *options, url], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
