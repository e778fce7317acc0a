"""The public API and the plug-in API are those of public_api.txt.

A test that fails here means a change for users: names go only after a deprecation (CONTRIBUTING.md), and PLUGIN_API
grows where a plug-in has to be changed. If the change is meant, `python -m tests.docs.test_public_api` writes the file.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

from mervcache.plugins import PLUGIN_API
from tests.docs.pages import ROOT

FILE = Path(__file__).with_name("public_api.txt")
PACKAGES = ("mervcache", "featurestore", "trainer")
PAGE = "docs/extending.md"


def described(name: str, value: object) -> str:
    """Signature of a function or class, with those of its public methods and the names of its properties."""
    if not inspect.isclass(value):
        return f"{name}{inspect.signature(value)}"
    lines = [name if issubclass(value, Exception) else f"{name}{inspect.signature(value)}"]
    for each, member in sorted(vars(value).items()):
        if each.startswith("_") or isinstance(member, ModuleType):
            continue
        if inspect.isfunction(member) or isinstance(member, classmethod):
            lines.append(f"  {each}{inspect.signature(getattr(value, each))}")
        elif isinstance(member, property) or type(member).__name__ == "cached_property":
            lines.append(f"  {each}")
    return "\n".join(lines)


def plug_in_names() -> list[str]:
    """Full names of the table under Stability; a name without a module belongs to the module before it."""
    rows = re.findall(r"^\| (?:encoders|datasets|fusions) \| (.*) \|$", (ROOT / PAGE).read_text(), re.MULTILINE)
    names, module = [], ""
    for name in re.findall(r"`([\w.]+)`", " ".join(rows)):
        module = name.rpartition(".")[0] or module
        names.append(name if "." in name else f"{module}.{name}")
    return sorted(names)


def api() -> str:
    """What users and plug-ins can rely on."""
    lines = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        lines += [described(f"{package}.{name}", getattr(module, name)) for name in sorted(module.__all__)]
    lines.append(f"PLUGIN_API {PLUGIN_API}")
    for name in plug_in_names():
        module, _, attribute = name.rpartition(".")
        lines.append(described(name, getattr(importlib.import_module(module), attribute)))
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join(lines)) + "\n"


def test_the_api_has_not_changed():
    assert api().splitlines() == FILE.read_text().splitlines()


def test_the_page_names_the_version_of_the_plug_in_api():
    assert f"The plug-in API has version {PLUGIN_API} " in (ROOT / PAGE).read_text()
    assert len(plug_in_names()) == 13


if __name__ == "__main__":
    FILE.write_text(api())
