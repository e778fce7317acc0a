"""Every command has examples in its help, which can be typed; programs print their version; shells complete names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipeline.cli.extract import main
from tests.docs.pages import PROGRAMS, ROOT
from trainer.main import eval_main, train_main

COMMANDS = dict(zip(PROGRAMS, (main, train_main, eval_main), strict=True))


def walk(command: click.Command, words: tuple[str, ...]):
    yield words, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from walk(child, (*words, name))


ALL = [entry for program, command in COMMANDS.items() for entry in walk(command, (program,))]


def examples_of(command: click.Command) -> list[str]:
    _, _, text = (command.epilog or "").partition("\b\nExamples:\n")
    return [line.strip() for line in text.partition("\n\n")[0].splitlines()]


@pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_a_command_shows_examples_that_can_be_typed(words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = examples_of(command)
    assert lines, f"{' '.join(words)} has no example"
    shown = CliRunner().invoke(COMMANDS[words[0]], [*words[1:], "--help"], terminal_width=200).output
    for line in lines:
        assert line in shown
        typed = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", line))
        typed = typed[: typed.index(next((word for word in typed if word in (">", "|")), typed[-1])) + 1]
        typed = [word for word in typed if word not in (">", "|")]
        assert tuple(typed[: len(words)]) == words
        for word in typed:  # what must exist
            if re.fullmatch(r"[\w-]+\.(json|yaml|csv)", word):
                Path(word).write_text("{}")
            elif word in ("exported", "MY_VIDEOS") or word.startswith("runs/"):
                Path(word).mkdir(parents=True, exist_ok=True)
        parse(COMMANDS[words[0]], typed)


def parse(command: click.Command, typed: list[str]) -> None:
    """Click refuses what does not exist."""
    program, *rest = typed
    parent = None
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        parent = click.Context(command, info_name=program, parent=parent)
        command = command.commands[rest.pop(0)]
    command.make_context(program, rest, parent=parent)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_prints_its_version(program):
    result = CliRunner().invoke(COMMANDS[program], ["--version"], prog_name=program)
    assert result.output == f"{program}, version {version('merv-pipeline')}\n"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with the three programs of this checkout, and a store under features/."""
    folder = tmp_path_factory.mktemp("shell")
    places = zip(
        PROGRAMS, ("pipeline.cli.extract:main", "trainer.main:train_main", "trainer.main:eval_main"), strict=True
    )
    for program, place in places:
        module, _, name = place.partition(":")
        start = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        (folder / program).write_text(f"{start}from {module} import {name}\n{name}()\n")
        (folder / program).chmod(0o755)
    for store in ("lab", "demo"):
        (folder / f"features/{store}.zarr").mkdir(parents=True)
        (folder / f"features/{store}.zarr/zarr.json").touch()
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("merv-pipeline extract --dataset vid", ["videollava"]),
        ("merv-pipeline extract --encoders siglip,lang", ["siglip,languagebind"]),
        ("merv-pipeline report features/", ["features/demo.zarr", "features/lab.zarr"]),
        ("merv-train --from-cache features/l", ["features/lab.zarr"]),
        ("merv-eval run --store features/d", ["features/demo.zarr"]),
        ("merv-pipeline quar", ["quarantine"]),
    ],
)
def test_bash_completes_names(programs, line, expected):
    words = line.split(" ")
    function = f"_{words[0].replace('-', '_')}_completion"
    script = f"""
source <(merv-pipeline completion bash)
COMP_WORDS=({" ".join(map(shlex.quote, words))})
COMP_CWORD={len(words) - 1}
{function} {words[0]}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=programs, env=environment, capture_output=True, text=True
    )
    assert (done.stdout.split(), done.stderr) == (expected, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script_for_all_programs(shell):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0, result.output
    for program in PROGRAMS:
        assert f"{program.replace('-', '_').upper()}_COMPLETE" in result.output
