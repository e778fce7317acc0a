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
# Rooms and files of trainer, lowest first: each imports only what stands before it. Files not named stand above all.
TRAINER_ORDER = ("overlay", "config", "recipes", "bar", "data", "live", "model", "runs", "loop", "give")
TRAINER_DOORS = {"trainer/runs/rebuild.py": {"end_to_end"}}
LIMIT_LINES = 350
FILES = sorted(path.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Modules, and what is taken from them, which may be modules too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported_rooms(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)} & (set(MAY_IMPORT) | {"tests", "benchmarks"})


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_room_imports_only_the_rooms_it_may(path):
    room = path.parts[0]
    allowed = {room} | MAY_IMPORT[room] | DOORS.get(path.as_posix(), set())
    assert imported_rooms(path) <= allowed


def place_in_trainer(path: Path) -> str | None:
    """Which entry of `TRAINER_ORDER` a file belongs to; None: it stands above all."""
    name = path.parts[1].removesuffix(".py") if path.parts[0] == "trainer" else None
    return name if name in TRAINER_ORDER else None


@pytest.mark.parametrize("path", [path for path in FILES if place_in_trainer(path)], ids=str)
def test_trainers_rooms_stand_in_one_order(path):
    below = TRAINER_ORDER[: TRAINER_ORDER.index(place_in_trainer(path)) + 1]
    allowed = {*below, *TRAINER_DOORS.get(path.as_posix(), ())}
    assert {name.split(".")[1] for name in imported_names(path) if name.startswith("trainer.")} <= allowed


def test_every_room_of_trainer_has_a_place_in_the_order():
    assert {path.parts[1] for path in FILES if path.parts[0] == "trainer" and len(path.parts) > 2} <= {*TRAINER_ORDER}


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
