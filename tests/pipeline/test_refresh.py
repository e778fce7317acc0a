"""Media that change after they were encoded: told, left alone, and computed again when that is asked for."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter
from importlib import import_module

import numpy as np
import pytest
from click.testing import CliRunner

from featurestore import FeatureStore, verify_store
from featurestore.writer import StoreWriter
from pipeline.cli.extract import main
from pipeline.encoders import weights
from pipeline.extract import extract
from pipeline.media import Source
from pipeline.plan import StoreView
from pipeline.recompute import verify_media
from pipeline.refresh import stale_media

CLIP = "videollava/videochatgpt_tune/v1.mp4"
ONE = {"encoders": ("siglip",), "limit": 3, "canaries": False}


@pytest.fixture
def filled(lab):
    """Three films in a store, and a folder of media that a test may spoil."""
    lab.copy_of_root()
    lab.extract(**ONE)
    return lab


@pytest.fixture
def run(caplog):
    """`run(lab, **changes)` extracts and returns (summary, what was logged)."""
    caplog.set_level(logging.INFO, logger="pipeline")

    def extract_with(lab, **changes):
        caplog.clear()
        return extract(lab.config(**ONE | changes), quiet=True), "\n".join(caplog.messages)

    return extract_with


def exchange(lab, path: str = "videochatgpt_tune/v1.mp4", other: str = "valley/v6.mp4") -> None:
    shutil.copy(lab.root / other, lab.root / path)


def tokens(lab, clip: str = CLIP, encoder: str = "siglip") -> np.ndarray:
    return FeatureStore.open(lab.store).read([clip], encoder=encoder)


def test_a_changed_file_is_told_and_neither_computed_nor_forgotten(filled, run):
    before, stored = filled.hashes(filled.store), tokens(filled)
    exchange(filled)
    summary, said = run(filled)
    assert (summary.clips, summary.changed, summary.refreshed) == (0, 1, 0)
    assert "1 clip has other media than their tokens were made from; nothing is computed for that" in said
    assert "`extract --refresh` computes them again" in said
    assert "loaded in" not in said  # nothing to compute: no encoder was loaded
    assert filled.hashes(filled.store) == before
    assert np.array_equal(tokens(filled), stored)


@pytest.mark.parametrize("refresh", [(), ("--refresh",)])
def test_changed_media_are_told_once_in_a_run(refresh, filled, tmp_path):
    exchange(filled)
    (tmp_path / "config.yaml").write_text(filled.config(**ONE).to_yaml())
    result = CliRunner().invoke(main, ["extract", "--config", str(tmp_path / "config.yaml"), *refresh])
    assert result.exit_code == 0, result.output
    assert [line.split(" media")[0] for line in result.output.splitlines() if " media" in line] == ["1 clip has other"]


def test_refresh_computes_the_changed_clip_in_a_new_row_and_touches_no_old_byte(filled, run):
    before, old = filled.hashes(filled.store), FeatureStore.open(filled.store)
    stored = tokens(filled)
    exchange(filled)
    summary, said = run(filled, refresh=True)
    assert (summary.clips, summary.failed, summary.refreshed, summary.changed) == (1, 0, 1, 0)
    assert "siglip loaded in " in said
    after = filled.hashes(filled.store)
    assert {name for name in before if after[name] != before[name]} <= {n for n in before if n.endswith("zarr.json")}
    store = FeatureStore.open(filled.store)
    assert store.rows([CLIP], encoder="siglip").tolist() == [4]  # a new block of 4
    assert not np.array_equal(tokens(filled), stored)
    assert np.array_equal(old.read([CLIP], encoder="siglip"), stored)  # a reader of before goes on reading
    assert verify_store(filled.store, "full") == []
    assert verify_media(filled.store, "full", root=str(filled.root)) == []  # the newest row counts
    again, said = run(filled, refresh=True)
    assert (again.clips, again.refreshed, "loaded in" in said) == (0, 0, False)


def test_a_refresh_that_was_cut_short_goes_on_in_the_rows_it_had(filled, run):
    exchange(filled)
    store_rows = len(FeatureStore.open(filled.store).clips)
    extraction, _, _ = filled.plan(**ONE, refresh=True)  # and killed
    assert extraction.scan_media().changed == {"siglip": {CLIP}}
    plain, _ = run(filled)
    assert (plain.clips, plain.changed) == (0, 1)  # a run that did not ask leaves the waiting row alone
    assert run(filled, refresh=True)[0].clips == 1
    assert StoreWriter.open(filled.store).clips().num_rows == store_rows + 1


def test_an_encoder_that_saw_the_new_media_is_not_computed_again(filled, run):
    exchange(filled)
    both = {"encoders": ("siglip", "dinov2")}
    summary, _ = run(filled, **both)
    assert (summary.clips, summary.changed) == (3, 1)  # dinov2 is new and reads what is there now
    seen = tokens(filled, encoder="dinov2")
    refreshed, _ = run(filled, **both, refresh=True)
    assert refreshed.clips == 1
    assert "encode:dinov2" not in refreshed.stage_s
    assert np.array_equal(tokens(filled, encoder="dinov2"), seen)


def test_new_media_that_fail_are_tried_once_and_the_old_tokens_stay(filled, run):
    stored = tokens(filled)
    (filled.root / "videochatgpt_tune/v1.mp4").write_bytes(b"not a film")
    assert run(filled, refresh=True)[0].failed == 1
    assert np.array_equal(tokens(filled), stored)
    again, said = run(filled, refresh=True)
    assert (again.clips, again.refreshed) == (0, 0)
    assert "1 clip has new media that failed: the tokens of the old ones stay" in said


def test_only_files_that_were_touched_since_their_run_are_read_and_each_once(filled, run, monkeypatch):
    from pipeline.datasets import load_dataset

    read: list[str] = []
    digest = Source.sha256
    monkeypatch.setattr(Source, "sha256", lambda self: read.append(self.path) or digest(self))
    monkeypatch.setattr("pipeline.refresh.CLOCK_SLACK_S", 0.0)  # the media are copied a moment before the run
    exchange(filled)
    store, listing = StoreWriter.open(filled.store), load_dataset("videollava", str(filled.root), limit=3)
    identities = FeatureStore.open(filled.store).encoders
    found = stale_media(StoreView(store), listing, identities)
    assert (found.looked_at, found.changed, read) == (3, {"siglip": {CLIP}}, ["videochatgpt_tune/v1.mp4"])
    stale_media(StoreView(store), listing, identities)
    assert len(read) == 1  # remembered
    assert stale_media(StoreView(store), listing, identities, full=True).clips == {CLIP}
    assert len(read) == 4
    exchange(filled, other="valley/v5.mp4")
    unread = stale_media(StoreView(store), listing, identities, budget_bytes=10)
    assert (unread.not_compared, unread.clips) == ({CLIP}, frozenset())
    assert len(read) == 4


def test_a_run_with_nothing_to_do_loads_nothing_and_one_with_work_loads(filled, run, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("a cluster was started")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.extract.connect", refuse)
        summary, _ = run(filled)
        assert (summary.clips, summary.listed, summary.snapshot) == (0, 3, FeatureStore.open(filled.store).snapshot)
        beside = {"grid": "raw", "new_identity": True}
        for changes in ({"limit": 4}, {"weights": "random:1"}, beside, {"encoders": ("siglip", "vivit")}):
            with pytest.raises(AssertionError, match="a cluster was started"):
                run(filled, **changes)
    record = max(
        (r for n, r in FeatureStore.open(filled.store).journal() if n.endswith("-driver")), key=lambda r: r["started"]
    )
    assert record["encoders"]["siglip"].keys() == {"group", "device", "threads"}
    assert (record["blocks"], record["summary"]["clips"]) == ({}, 0)


def test_a_wrong_remembered_digest_is_replaced_by_what_was_loaded(filled, run):
    settings = filled.config(**ONE).encoder_settings[0]
    mark = weights.weights_fingerprint(settings.spec, settings.weights)
    right = weights.cached_weights_digest(mark)
    assert right == FeatureStore.open(filled.store).encoders["siglip"].weights_sha256
    assert weights.cache_weights_digest(mark, "0" * 64)
    summary, said = run(filled)
    assert summary.clips == 0  # loaded, found equal to what is stored
    assert "the remembered digest of siglip's weights was wrong: replaced" in said
    assert weights.cached_weights_digest(mark) == right


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """How often the driver opens a store's place, plans, and compares media; workers are other threads."""
    found: Counter = Counter()

    def count(module: str, name: str) -> None:
        original = getattr(import_module(module), name)

        def counted(*arguments, **settings):
            if threading.current_thread() is threading.main_thread():
                found[name] += 1
            return original(*arguments, **settings)

        monkeypatch.setattr(f"{module}.{name}", counted)

    for module in ("pipeline.extract", "featurestore.writer"):
        count(module, "open_objects")
    count("pipeline.extract", "plan_blocks")
    count("pipeline.refresh", "stale_media")
    return found


def test_a_run_opens_its_store_once_and_plans_once(lab, counts):
    lab.copy_of_root()
    lab.extract(**ONE)  # cold
    assert counts == {"open_objects": 1, "plan_blocks": 1, "stale_media": 1}
    counts.clear()
    assert lab.extract(**ONE).clips == 0  # finished
    assert counts == {"open_objects": 1, "plan_blocks": 1, "stale_media": 1}
    counts.clear()
    assert lab.extract(**ONE, refresh=True).refreshed == 0  # finished, nothing to refresh
    assert counts == {"open_objects": 1, "plan_blocks": 1, "stale_media": 1}
    exchange(lab)
    counts.clear()
    assert lab.extract(**ONE, refresh=True).clips == 1  # planned again, with the new rows
    assert counts == {"open_objects": 1, "plan_blocks": 2, "stale_media": 1}


def test_a_continued_run_plans_once(lab, counts):
    lab.plan(**ONE)  # and killed: rows are allocated, nothing is computed
    counts.clear()
    assert lab.extract(**ONE).clips == 3
    assert counts == {"open_objects": 1, "plan_blocks": 1, "stale_media": 1}


def test_blocks_that_another_driver_committed_while_the_cluster_started_are_not_planned(lab, monkeypatch):
    from pipeline import extract as driver

    lab.plan(**ONE)  # and killed: rows are allocated, nothing is computed
    describe = driver.describe

    def after_another_run(client, config):
        monkeypatch.setattr(driver, "describe", describe)
        assert lab.extract(**ONE).clips == 3
        return describe(client, config)

    monkeypatch.setattr(driver, "describe", after_another_run)
    summary = lab.extract(**ONE)
    assert (summary.clips, summary.blocks) == (0, 0)
