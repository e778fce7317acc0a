"""The API pages: every public name is on one, and its docstring says what each parameter is."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator

import pytest

import mervcache
from tests.docs.pages import ROOT

IDENTIFIER = re.compile(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", re.MULTILINE)


def resolve(path: str) -> object:
    """The object of a dotted path."""
    names, value = path.split("."), None
    for end in range(len(names), 0, -1):
        try:
            value = importlib.import_module(".".join(names[:end]))
        except ModuleNotFoundError:
            continue
        for name in names[end:]:
            value = getattr(value, name)
        break
    return value


def entries() -> Iterator[tuple[str, object]]:
    """Name and object of everything that the pages show, without the members of classes."""
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        for path, members in IDENTIFIER.findall(page.read_text()):
            if members:
                yield from ((f"{path}.{name}", resolve(f"{path}.{name}")) for name in members.split(", "))
            elif not inspect.ismodule(resolve(path)):
                yield path, resolve(path)


ENTRIES = dict(entries())


def callables() -> Iterator[tuple[str, object, str]]:
    """Name, function and docstring of every function and public method on the pages; a class stands for its init."""
    for name, value in ENTRIES.items():
        if not inspect.isclass(value):
            yield name, value, inspect.getdoc(value) or ""
            continue
        made_by_another = "make one with" in (inspect.getdoc(value) or "")
        if not (dataclasses.is_dataclass(value) or issubclass(value, Exception) or made_by_another):
            yield name, value, inspect.getdoc(value) or ""
        for each, member in vars(value).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if inspect.isfunction(function) and not each.startswith("_") and function.__doc__:  # others are not shown
                yield f"{name}.{each}", getattr(value, each), inspect.getdoc(function) or ""


def parameters(function: object) -> list[str]:
    """Names of its parameters; a type or a default that explains itself is no excuse."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


CALLABLES = list(callables())


@pytest.mark.parametrize(("name", "function", "text"), CALLABLES, ids=[name for name, _, _ in CALLABLES])
def test_a_docstring_says_what_each_parameter_is(name, function, text):
    missing = [each for each in parameters(function) if not re.search(rf"\b{each}\b", text)]
    assert not missing, f"{name} does not say what {', '.join(missing)} is"


def test_every_public_name_is_on_a_page():
    shown = list(ENTRIES.values())
    table = (ROOT / "docs/api/mervcache.md").read_text()
    for name in mervcache.__all__:
        value = getattr(mervcache, name)
        assert f"`{name}`" in table
        value = getattr(value, "__func__", value)
        assert name in ("MervCacheError", "open_store") or any(value is each for each in shown), name


def test_what_the_pages_name_exists():
    assert len(ENTRIES) > 45
    assert len(CALLABLES) > 90
