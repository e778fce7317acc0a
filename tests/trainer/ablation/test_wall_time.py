"""Times of a sweep by hand: what was measured, what is computed from it, and that a table has both."""

from __future__ import annotations

import json

import pytest

from mervcache.errors import UserError
from tests.trainer.ablation.conftest import entry, make_answer
from trainer.ablation.document import NotComputed
from trainer.ablation.live_time import add_end_to_end
from trainer.ablation.results import read_results
from trainer.ablation.supervise import RunTime
from trainer.ablation.sweep import SweepRun
from trainer.ablation.table import make_table
from trainer.ablation.wall_time import add_run_time, describe, read_times, time_section

RUNS = (
    SweepRun(name="text", encoders=(), mode="text-only"),
    SweepRun(name="one", encoders=("dinov2",)),
    SweepRun(name="two", encoders=("dinov2", "vivit")),
)
# 100 clips in 80 s of one worker: 20 s of them to decode, 10 s dinov2, 40 s vivit, 10 s to commit.
JOURNAL = [
    {
        "host": "here",
        "summary": {
            "clips": 100,
            "elapsed_s": 90.0,
            "stage_s": {"total": 80.0, "encode:dinov2": 10.0, "encode:vivit": 40.0, "commit": 10.0},
            "made": {"video/dinov2": {"clips": 100}, "video/vivit": {"clips": 100}},
        },
    }
]


@pytest.fixture
def finished(tmp_path):
    """A sweep whose runs took 2 steps of 10 samples at 5 a second, or were only scored."""
    add_run_time(tmp_path, "text", RunTime(train_s=0.0, score_s=2.0))
    for name in ("one", "two"):
        add_run_time(tmp_path, name, RunTime(train_s=6.0, score_s=1.0))
        (tmp_path / "runs" / name).mkdir(parents=True)
        rows = [json.dumps({"step": step, "samples": 10, "samples_per_s": 5.0}) for step in range(2)]
        (tmp_path / "runs" / name / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return tmp_path


def compute(sweep, make_sample, journal=JOURNAL):
    samples = [make_sample(index) for index in range(3)] + [make_sample(3, clip_id=None)]
    questions = [make_sample(index, split="heldout") for index in (5, 5, 6)]  # about two clips
    add_end_to_end(sweep, RUNS, journal, encoders=["dinov2", "vivit"], samples=samples, questions=questions)


def test_end_to_end_adds_the_encoding_of_every_clip_shown(finished, make_sample):
    compute(finished, make_sample)
    times = read_times(finished)
    # 3 of 4 samples have a clip: 15 of 20, and 2 questions' clips; 0.2 s to decode + 0.1 s dinov2 (+ 0.4 s vivit)
    assert {name: entry["live_s"] for name, entry in times["runs"].items()} == {
        "text": 0.0,
        "one": pytest.approx(17 * 0.3),
        "two": pytest.approx(17 * 0.7),
    }
    section = time_section(finished)
    *rows, total, extraction = section.rows
    assert rows[1] == ("one", 2, 4.0, 6.0, 1.0, pytest.approx(7 + 17 * 0.3))
    assert total == ("all runs", 4, 8.0, 12.0, 4.0, pytest.approx(16 + 17))
    assert extraction[3] == 90.0
    assert "16.0 s measured" in describe(times)
    assert "end to end, computed: 33.0 s" in describe(times)


def test_a_store_without_a_journal_gives_the_measured_times_alone(finished, make_sample):
    compute(finished, make_sample, journal=[])
    section = time_section(finished)
    assert all(isinstance(row[-1], NotComputed) for row in section.rows)
    assert "end to end not computed: the store's journal records no extraction" in describe(read_times(finished))


def test_sessions_that_a_run_needed_add_up(tmp_path):
    add_run_time(tmp_path, "one", RunTime(train_s=6.0, score_s=0.0))
    add_run_time(tmp_path, "one", RunTime(train_s=1.5, score_s=2.0))
    assert read_times(tmp_path)["runs"] == {"one": {"train_s": 7.5, "score_s": 2.0}}
    (tmp_path / "times.json").write_text('{"format": 2, "runs": {}}')
    with pytest.raises(UserError, match="this version reads 1"):
        read_times(tmp_path)


def test_a_table_has_the_times_in_a_block_of_their_own(new_sweep):
    sweep = new_sweep()
    for subset in (("a",), ("a", "b")):
        sweep.add(entry(subset), [make_answer(index, right=index % 2 == 0) for index in range(4)])
    assert not any(section.block == "time" for section in make_table(read_results(sweep.path), draws=50).sections)
    add_run_time(sweep.path, "any", RunTime(train_s=6.0, score_s=1.0))
    (section,) = [s for s in make_table(read_results(sweep.path), draws=50).sections if s.block == "time"]
    assert section.rows[0][:1] == ("any",)
