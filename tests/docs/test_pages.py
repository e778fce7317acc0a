"""README and pages: Python blocks run, commands and their options exist, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipeline.cli.extract import main
from tests.docs.pages import NOT_RUN, PAGES, PROGRAMS, ROOT, blocks_of
from trainer.main import eval_main, train_main

COMMANDS = dict(zip(PROGRAMS, (main, train_main, eval_main), strict=True))
LINES = [
    (block, words)
    for page in PAGES
    for block in blocks_of(page)
    if not block.mark.startswith(NOT_RUN)
    for words in block.commands
]


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks_of(page))])
def test_the_code_of_a_page_runs_in_order(page, reader_folder):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if not block.runs:
            continue
        if block.language == "python":  # line numbers of a traceback are those of the page
            exec(compile("\n" * (block.line - 1) + block.code, ROOT / page, "exec"), namespace)
            continue
        assert len(block.commands) == len(block.code.splitlines()), f"{page}:{block.line} has lines that are not run"
        for program, *words in block.commands:
            result = CliRunner().invoke(COMMANDS[program], words)
            assert result.exit_code == 0, f"{page}:{block.line} {program} {words}\n{result.output}"


@pytest.fixture
def named_files(tmp_path, monkeypatch):
    """A folder in which the files that commands name are there."""
    monkeypatch.chdir(tmp_path)
    for _, words in LINES:
        for word in words:
            if re.fullmatch(r"[\w-]+\.(json|yaml|csv|pt|mp4)", word):
                Path(word).write_text("{}")
            elif re.fullmatch(r"[\w-]+", word) and word not in (*PROGRAMS, "local"):
                Path(word).mkdir(exist_ok=True)


@pytest.mark.parametrize(("block", "words"), LINES, ids=[f"{b.page}:{b.line} {' '.join(w)[:60]}" for b, w in LINES])
def test_a_command_and_its_options_exist(block, words, named_files):
    program, *rest = words
    command, parent = COMMANDS[program], None
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        parent = click.Context(command, info_name=program, parent=parent)
        command = command.commands[rest.pop(0)]
    assert command.make_context(program, rest, parent=parent).params  # click refuses what does not exist


@pytest.mark.parametrize("words", ["--from-cache", "--end-to-end", "--mode full", "--launch", "--resume auto", "ask"])
def test_there_is_a_command_of_every_kind(words):
    assert any(words in " ".join(line) for _, line in LINES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if heading and path.suffix == ".md":
            assert heading in headings(path), f"{page}: {target}"


def headings(path: Path) -> set[str]:
    """Anchors of a page, as GitHub and the site make them."""
    names = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", name.lower()).strip().replace(" ", "-") for name in names}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
