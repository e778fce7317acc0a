"""The house: who may import whom. Every import of every file is read, nested ones included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "featurestore": set(),
    "jobs": set(),
    "pipeline": {"featurestore", "jobs"},
    "trainer": {"featurestore"},
}
DOORS = {"trainer/end_to_end.py": {"pipeline"}}
LIMIT_LINES = 350
FILES = sorted(path.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; imports are absolute"
            names.add(node.module)
    return {name.split(".")[0] for name in names} & (set(MAY_IMPORT) | {"tests", "benchmarks"})


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_room_imports_only_the_rooms_it_may(path):
    room = path.parts[0]
    allowed = {room} | MAY_IMPORT[room] | DOORS.get(path.as_posix(), set())
    assert imported_rooms(path) <= allowed


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_one_room_and_says_what_it_holds(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= LIMIT_LINES, f"{path} is past {LIMIT_LINES} lines: find the second room"
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring that says what the room does"


def test_the_package_list_names_every_folder_that_holds_code():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.as_posix().replace("/", ".") for path in FILES}
    assert sorted(found) == sorted(listed)
