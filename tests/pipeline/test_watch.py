"""Watching a store from outside: counts by hand from receipts, rates by hand from their times."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from featurestore.lease import StoreLease
from pipeline.cli.extract import main
from pipeline.cli.render import watch_line
from pipeline.status import ProgressMonitor, rate, watch

NOW = 1_000_000.0
# Nine videos and five stills in blocks of four: rows of the blocks, in the order in which they are committed here.
ROWS = {"video": (4, 4, 1), "image": (4, 1)}


@pytest.fixture
def running(extracted, tmp_path) -> Path:
    """A store as it stands in the middle of a run: SigLIP's first two video blocks, 10 s apart, none of the rest."""
    store = tmp_path / "store.zarr"
    shutil.copytree(extracted.store, store)
    for receipt in store.glob("receipts/*/*/*.json"):
        kept = receipt.parts[-3] == "video" and receipt.parts[-2].startswith("siglip") and receipt.stem < "00000002"
        if kept:
            at = NOW - 20 + 10 * int(receipt.stem)
            os.utime(receipt, (at, at))
        else:
            receipt.unlink()
    return store


def test_a_run_in_the_middle_is_told_from_its_receipts(running):
    found = {entry.encoder.split("-")[0]: entry for entry in ProgressMonitor(running).look(NOW).encoders}
    siglip, vivit = found["siglip"], found["vivit"]
    assert (siglip.blocks, siglip.all_blocks, siglip.clips, siglip.all_clips) == (2, 5, 8, 14)
    assert siglip.clips_per_s == pytest.approx(4 / 20)  # the first commit starts the clock
    assert siglip.seconds_left == pytest.approx(6 / (4 / 20))
    assert (vivit.blocks, vivit.clips, vivit.clips_per_s, vivit.seconds_left) == (0, 0, None, None)


def test_while_a_run_has_the_store_its_pace_counts_from_when_it_took_it(running):
    with StoreLease(running, "now") as lease:
        record = lease.holder()
        for began, per_s in ((NOW - 40, 8 / 40), (NOW - 15, 4 / 20), (NOW - 4000, 4 / 20)):
            (running / "tmp" / "driver.lease").write_text(json.dumps({**record, "since": began}))
            siglip = next(e for e in ProgressMonitor(running).look(NOW).encoders if e.encoder.startswith("siglip"))
            assert siglip.clips_per_s == pytest.approx(per_s)


def test_without_snapshots_a_young_run_is_watched_all_the_same(running):
    shutil.rmtree(running / "snapshots")
    assert ProgressMonitor(running).look(NOW).seconds_left == pytest.approx(30)


def test_watching_ends_when_everything_given_out_is_committed(running, extracted):
    looks = watch(
        running,
        3.0,
        sleep=lambda seconds: shutil.copytree(extracted.store / "receipts", running / "receipts", dirs_exist_ok=True),
    )
    first, second = looks
    assert (first.is_done, second.is_done) == (False, True)
    assert all((e.blocks, e.clips) == (5, 14) for e in second.encoders)
    assert watch_line(second).count("14/14 clips (5/5 blocks)") == 4


@pytest.mark.parametrize(
    ("commits", "now", "expected"),
    [
        ([], 10.0, None),
        ([(5.0, 8)], 10.0, None),  # one commit has no pace
        ([(0.0, 8), (10.0, 8)], 20.0, 8 / 20),
        ([(100.0 * n, 8) for n in range(11)], 1000.0, 3 * 8 / 300),  # at 800, 900 and 1000: the last 300 s
        ([(0.0, 8), (50_000.0, 8), (50_010.0, 8)], 50_020.0, 8 / 20),  # after a night's pause the clock starts anew
        ([(0.0, 8), (10.0, 8)], 1000.0, None),  # nothing for five minutes: it stands still
    ],
)
def test_rates_are_of_the_last_five_minutes(commits, now, expected):
    assert rate(commits, now) == (expected if expected is None else pytest.approx(expected))


def test_the_command_prints_a_line_per_look_and_json_for_programs(extracted):
    told = CliRunner().invoke(main, ["status", str(extracted.store), "--watch", "1"])
    assert told.exit_code == 0, told.output
    assert told.stdout.count("14/14 clips (5/5 blocks)") == 4
    plain = CliRunner().invoke(main, ["status", str(extracted.store), "--watch", "--json"])
    look = json.loads(plain.stdout)
    assert (look["is_done"], len(look["encoders"])) == (True, 4)
