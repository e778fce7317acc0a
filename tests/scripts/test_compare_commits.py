"""The comparison of two commits sees what differs, and leaves out only times, hosts and scratch files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def two_stores(tmp_path):
    """Two folders with the same results, in other journals."""
    for side in ("base", "current"):
        store = tmp_path / side
        (store / "video" / "c").mkdir(parents=True)
        (store / "video" / "c" / "0").write_bytes(b"tokens")
        (store / "journal").mkdir()
        (store / "journal" / f"{side}.json").write_text(side)
    return tmp_path / "base", tmp_path / "current"


def test_journals_are_left_aside(two_stores):
    from compare_commits import compare_folders, is_equal

    row = compare_folders(*two_stores, ())
    assert is_equal(row)
    assert row["files"] == 1


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        (lambda store: (store / "video" / "c" / "0").write_bytes(b"token5"), ["video/c/0"]),
        (lambda store: (store / "video" / "c" / "0").unlink(), ["video/c/0"]),
        (lambda store: (store / "more.json").write_text("{}"), ["more.json"]),
    ],
    ids=["changed", "missing", "added"],
)
def test_a_file_that_differs_is_named_and_may_be_accepted(two_stores, change, differ):
    from compare_commits import compare_folders, is_equal

    change(two_stores[1])
    row = compare_folders(*two_stores, ())
    assert row["differ"] == differ
    assert not is_equal(row)
    accepted = compare_folders(*two_stores, ("*.json", "video/*"))
    assert is_equal(accepted)
    assert accepted["accepted"] == differ


def write_metrics(folder, *rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_losses_are_compared_exactly_and_rates_are_not(tmp_path):
    from compare_commits import digests

    first = write_metrics(tmp_path / "a", {"step": 0, "loss": 2.5, "samples_per_s": 9.0, "wait_share": 0.1})
    same = write_metrics(tmp_path / "b", {"step": 0, "loss": 2.5, "samples_per_s": 7.0, "wait_share": 0.2})
    other = write_metrics(tmp_path / "c", {"step": 0, "loss": 2.5000000000000004, "samples_per_s": 9.0})
    assert digests(first) == digests(same) != digests(other)


def test_of_a_step_that_was_trained_twice_the_second_counts(tmp_path):
    from compare_commits import digests

    through = write_metrics(tmp_path / "a", {"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0})
    again = write_metrics(
        tmp_path / "b",
        {"step": 0, "loss": 3.0},
        {"step": 1, "loss": 2.0},
        {"step": 0, "loss": 3.0},
        {"step": 1, "loss": 2.0},
    )
    other = write_metrics(tmp_path / "c", {"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 1, "loss": 2.5})
    assert digests(through) == digests(again) != digests(other)


def test_printed_results_are_compared_without_times(tmp_path):
    from compare_commits import digests

    def printed(name, **values):
        folder = tmp_path / name
        (folder / "printed").mkdir(parents=True)
        (folder / "printed" / "extract.json").write_text(json.dumps({"clips": 4, "failed": 0, **values}))
        return folder

    first = printed("a", elapsed_s=1.5, run="r1", made={"x": 1})
    same = printed("b", elapsed_s=2.5, run="r2", made={"x": 2})
    other = printed("c", elapsed_s=1.5, run="r1", made={"x": 1}, failed=1)
    assert digests(first) == digests(same) != digests(other)


@pytest.mark.parametrize(("known", "word"), [("--baseline", "--baseline"), ("--beside", "--beside")])
def test_a_renamed_option_is_given_as_each_commit_calls_it(tmp_path, monkeypatch, known, word):
    from compare import sides

    monkeypatch.setattr(sides.Side, "run", lambda self, *words: f"  {known} PATH  Another run.")
    side = sides.Side(name=known, root=tmp_path, folder=tmp_path, work=tmp_path)
    assert side.command("merv-eval", "run", "--baseline", "runs/a")[1:] == ["run", word, "runs/a"]


def test_packages_of_another_checkout_are_refused(tmp_path, monkeypatch):
    from compare import sides

    (tmp_path / "work").mkdir()
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").touch()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    side = sides.Side(name="base", root=tmp_path, folder=tmp_path, work=tmp_path / "active")
    with pytest.raises(sides.CommandError, match="json is imported from"):
        side.check()
    monkeypatch.setattr(sides.Side, "packages", lambda self: ["json"])
    replace(side, root=Path(json.__file__).parents[1]).check()


def test_every_case_has_a_line_that_says_what_it_does():
    from compare.cases import CASES

    assert all(case.__doc__ for case in CASES.values())
