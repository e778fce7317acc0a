"""Import structure: which package may import which, and no import cycle between files or folders.

Every import statement counts, also those inside functions and under TYPE_CHECKING.
"""

import ast
import tomllib
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "mervcache": set(),
    "featurestore": {"mervcache"},
    "jobs": {"mervcache"},
    "pipeline": {"mervcache", "featurestore", "jobs"},
    "trainer": {"mervcache", "featurestore", "jobs"},
}
ENTRY_POINTS = {"trainer/end_to_end.py": {"pipeline"}}  # runs the encoders live
LIMIT_LINES = 500
FILES = sorted(path.relative_to(ROOT) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted(path.relative_to(ROOT) for name in ("benchmarks", "scripts") for path in (ROOT / name).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imported_names(path: Path) -> set[str]:
    """Modules, and what is taken from them, which may be modules too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(path: Path) -> set[str]:
    """Our own modules that a file imports, a symbol counted as its module."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in imported_names(path)}
    return {name for name in found if name in MODULES} - {module_name(path)}


def assert_no_cycle(graph: dict[str, set[str]]) -> None:
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_package_imports_only_the_packages_it_may(path):
    allowed = {path.parts[0]} | MAY_IMPORT[path.parts[0]] | ENTRY_POINTS.get(path.as_posix(), set())
    used = {name.split(".")[0] for name in imported_names(path)}
    assert used & ({*MAY_IMPORT, "tests", "benchmarks", "scripts"}) <= allowed


def test_there_is_no_import_cycle_between_files():
    assert_no_cycle({name: imported_modules(path) for name, path in MODULES.items()})


def folder_graph() -> dict[str, set[str]]:
    """Subfolders and the files beside them, each one node: what a folder's `__init__` exports belongs to the folder."""

    def node(name: str) -> str:
        path = MODULES[name]
        return ".".join(path.parts[:2]).removesuffix(".py") if len(path.parts) > 2 else name

    graph: dict[str, set[str]] = defaultdict(set)
    for name, path in MODULES.items():
        graph[node(name)] |= {node(other) for other in imported_modules(path)} - {node(name)}
    return graph


def test_there_is_no_import_cycle_between_folders():
    assert_no_cycle(folder_graph())


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=str)
def test_a_file_holds_one_subject_and_says_which(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= LIMIT_LINES, f"{path} is past {LIMIT_LINES} lines: does it hold two subjects?"
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


def test_the_package_list_names_every_folder_that_holds_code():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted({path.parent.as_posix().replace("/", ".") for path in FILES}) == sorted(listed)
