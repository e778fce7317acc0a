"""Self-contained HTML pages: one file without scripts or links, in light and dark, readable on a phone.

Text is escaped where it becomes HTML, unless it is `Markup`: names of clips, runs and encoders come from files. The
page's own policy keeps a browser from running scripts in it and from fetching anything for it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from mervcache.text import safe


class Markup(str):
    """HTML made by this program, not to be escaped."""


def escaped(text: str) -> Markup:
    """Untrusted text as HTML, also within a quoted attribute, without credentials and control characters."""
    return text if isinstance(text, Markup) else Markup(html.escape(safe(text)))


def make_page(*, title: str, subtitle: str, body: Markup, notices: Iterable[str] = (), style: str = "") -> str:
    """The whole page; `notices` stand below the title, `style` is added to the common style sheet."""
    folder = files("mervcache")
    return Template((folder / "page.html").read_text()).substitute(
        title=escaped(title),
        subtitle=escaped(subtitle),
        notices="".join(f"<p class='warn'>{escaped(notice)}</p>" for notice in notices),
        style=(folder / "page.css").read_text() + style,
        body=body,
    )


def cards(facts: Mapping[str, str]) -> Markup:
    """A card per fact: name -> value."""
    found = (
        f"<div class='card'><b>{escaped(value)}</b><span>{escaped(name)}</span></div>" for name, value in facts.items()
    )
    return Markup(f"<div class='cards'>{''.join(found)}</div>")


def note(text: str) -> Markup:
    """A paragraph in a quiet colour."""
    return Markup(f"<p class='quiet'>{escaped(text)}</p>")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Iterable[int] | None = None) -> Markup:
    """A table in a box that it scrolls in; on the right are the columns `right`, or every number by itself."""
    numeric = None if right is None else set(right)
    head = "".join(
        f"<th{_right(numeric is not None and index in numeric)}>{escaped(column)}</th>"
        for index, column in enumerate(columns)
    )
    body = "".join(
        f"<tr>{''.join(_cell(value, index, numeric) for index, value in enumerate(row))}</tr>" for row in rows
    )
    return Markup(f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>")


def _cell(value: Any, index: int, numeric: set[int] | None) -> str:
    is_right = isinstance(value, int | float) if numeric is None else index in numeric
    return f"<td{_right(is_right)}>{escaped(value if isinstance(value, str) else str(value))}</td>"


def _right(is_right: bool) -> str:
    return " class='n'" if is_right else ""
