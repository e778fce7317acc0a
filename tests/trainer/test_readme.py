"""The lines of the README that train and score are commands that exist, with options that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from trainer.cli import eval_main, train_main
from trainer.loop.launch import launch_command

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
LINES = re.findall(r"^(merv-(?:train|eval) [^#\n]*)", README, re.MULTILINE)
PROGRAMS = {"merv-train": train_main, "merv-eval": eval_main}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder in which the files that the lines name are there."""
    monkeypatch.chdir(tmp_path)
    for line in LINES:
        for word in shlex.split(line)[1:]:
            if re.fullmatch(r"[\w-]+\.(json|yaml)", word):
                Path(word).write_text("{}")


def parsed(line):
    """The options of a line, by the innermost command; click refuses what does not exist."""
    program, *words = shlex.split(line)
    command = PROGRAMS[program]
    if isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    return command.make_context(program, words).params


@pytest.mark.parametrize("line", LINES)
def test_a_line_can_be_typed(line):
    assert parsed(line)


@pytest.mark.parametrize("words", ["--from-cache", "--end-to-end", "--mode full", "--launch", "--resume auto", "ask"])
def test_there_is_a_line_of_every_kind(words):
    assert any(words in line for line in LINES)


def test_the_launch_line_starts_as_many_processes_as_it_says_of_the_command_it_is():
    (line,) = [line for line in LINES if "--launch" in line]
    options, words = parsed(line), shlex.split(line)[1:]
    command = launch_command(options["launch"], options["processes"], words)
    assert command[command.index("--num_processes") + 1] == str(options["processes"])
    assert command[-len(words) :] == words
    assert CliRunner().invoke(train_main, [*words, "--print-config"]).exit_code == 0
