"""What `status` and `inspect` tell of a store."""

from __future__ import annotations

import numpy as np
import pytest

from featurestore import FeatureStore
from mervcache.errors import StoreError, StoreNotFoundError, UserError
from pipeline.status import inspect_store, store_status

CLIP = "videollava/videochatgpt_tune/v1.mp4"


@pytest.fixture(scope="module")
def partial(extracted, tmp_path_factory):
    """One clip broken, one encoder for the videos only."""
    lab = type(extracted)(extracted.root, tmp_path_factory.mktemp("partial"))
    lab.copy_of_root()
    (lab.root / "videochatgpt_tune/v1.mp4").write_bytes(b"not a film")
    lab.extract(encoders=("siglip",))
    lab.extract(encoders=("languagebind",), kind="video")
    return lab


def test_status_counts_per_encoder_what_is_committed_failed_and_to_do(partial):
    status = store_status(partial.store)
    assert status["clips"] == {"video": 9, "image": 5}
    assert status["datasets"] == {"videollava": 14}
    assert status["samples"] == {"videollava-align": 3, "videollava-finetune": 15}
    rows = {row["encoder"]: (row["committed"], row["failed"], row["to_do"]) for row in status["encoders"]}
    assert rows == {"siglip": (13, 1, 0), "languagebind": (8, 1, 5)}
    ((reason, count),) = [item for item in status["quarantine"].items() if item[0].startswith("siglip")]
    assert (reason.startswith("siglip: not a video"), count) == (True, 1)
    assert status["bytes"] == sum(path.stat().st_size for path in partial.store.rglob("c/*/*/*/*/*"))
    assert {row["weights"] for row in status["encoders"]} == {"random:0"}


def test_a_finished_store_has_nothing_to_do(extracted):
    status = store_status(extracted.store)
    assert [(row["committed"], row["failed"], row["to_do"]) for row in status["encoders"]] == [(14, 0, 0)] * 4
    assert (status["quarantine"], status["snapshot"]) == ({}, extracted.summary.snapshot)


def test_an_encoder_is_shown_with_its_whole_identity(extracted):
    shown = inspect_store(extracted.store, "vivit")
    identity = FeatureStore.open(extracted.store).encoders["vivit"]
    assert (shown["encoder"], shown["id"], shown["weights"]) == ("vivit", identity.id, "random:0")
    assert identity.to_dict().items() <= shown.items()


@pytest.mark.parametrize("name", [CLIP, CLIP.removeprefix("videollava/"), "v1.mp4"])
def test_a_clip_is_found_by_its_id_its_path_or_an_end_of_it(name, extracted):
    shown = inspect_store(extracted.store, name)
    tokens = FeatureStore.open(extracted.store).read([CLIP], encoder="dinov2")[0].astype(np.float32)
    assert (shown["clip_id"], shown["kind"]) == (CLIP, "video")
    assert (shown["dinov2"]["shape"], shown["dinov2"]["row"]) == ([8, 3, 3, 32], 1)
    assert shown["dinov2"]["mean"] == pytest.approx(float(tokens.mean()), abs=1e-5)
    assert shown["dinov2"]["max"] == pytest.approx(float(tokens.max()), abs=1e-4)
    assert len(shown["samples"]) == 2
    assert "A block." in shown["samples"][0]


def test_a_clip_that_failed_is_shown_with_the_reason(partial):
    shown = inspect_store(partial.store, CLIP)
    assert shown["siglip"] == "not committed"
    assert shown["siglip failed"].startswith("not a video")


def test_a_name_that_fits_many_clips_or_none_says_which_there_are(extracted):
    with pytest.raises(UserError, match=r"'tune/v' is part of 5 clip ids, give one, or its end: videollava/"):
        inspect_store(extracted.store, "tune/v")
    with pytest.raises(UserError, match=r"no clip of this store is named 'v99'.*; its encoders: dinov2, "):
        inspect_store(extracted.store, "v99")


def test_a_place_without_a_store_or_without_a_snapshot_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where this runs there may be stores nearby
    from featurestore.writer import StoreWriter

    with pytest.raises(StoreNotFoundError, match="make one with `merv-pipeline extract --dataset NAME --store PATH`"):
        store_status(tmp_path / "nothing.zarr")
    StoreWriter.open_or_create(tmp_path / "young.zarr")
    with pytest.raises(StoreError, match="has no snapshot yet"):
        store_status(tmp_path / "young.zarr")
