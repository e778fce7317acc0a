"""The runbook: what it says is seen is what the code prints. Its commands are parsed with those of all pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT

PACKAGES = ("mervcache", "featurestore", "jobs", "pipeline", "trainer")
HOLE = "\0"  # in place of a value in a message
OF_OTHERS = {"ChildFailedError", "Mismatched versions"}  # printed by torch and Dask


def messages() -> Iterator[str]:
    """Every text in the code; values in an f-string are holes."""
    for path in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"\{\w+\}|%[sd.0-9f]+", HOLE, node.value)


CORPUS = "\n".join(messages())


def quotations() -> list[str]:
    """What the page quotes: after `Seen:` and in the first column of the tables of causes and reasons."""
    text = (ROOT / "docs/runbook.md").read_text()
    seen = re.findall(r"^Seen: (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return [re.sub(r"\s+", " ", one) for part in (*seen, *cells) for one in re.findall(r"`([^`]*)`", part)]


def fragments(quotation: str) -> list[str]:
    """Its words between what stands for values: dots, numbers, names, paths, capitals."""
    parts = re.split(r"\.\.\.|\S*\d\S*|\b[A-Z]{2,}\b|\S*/\S*|\b(?:dinov2|Merv\w+)\b|[()\n]", quotation)
    return [part.strip(" :,;.") for part in parts if len(part.strip(" :,;.")) > 7]


@pytest.mark.parametrize("quotation", [one for one in quotations() if one not in OF_OTHERS and fragments(one)])
def test_what_is_seen_is_what_the_code_prints(quotation):
    for fragment in fragments(quotation):
        assert fragment in CORPUS, f"no message has {fragment!r}"


def test_the_page_quotes_many_messages():
    assert len([one for one in quotations() if fragments(one)]) > 30
