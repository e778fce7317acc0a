"""The export for FiftyOne, by the rules of its type FiftyOneDataset; docs/explorer.md says what it was tried with."""

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from featurestore import FeatureStore
from mervcache.errors import EXIT_WITH_FAILURES, UserError
from pipeline.cli.extract import main
from pipeline.extract import extract
from pipeline.fiftyone import write_fiftyone


@pytest.fixture
def store(lab) -> FeatureStore:
    extract(lab.config(encoders=("siglip",)), quiet=True)
    return FeatureStore.open(lab.store)


def vector_of(field: dict) -> np.ndarray:
    assert set(field) == {"$binary"}
    data = zlib.decompress(base64.b64decode(field["$binary"]["base64"]))
    return np.load(io.BytesIO(data), allow_pickle=False)


def test_samples_name_the_media_and_hold_the_vectors_and_conversations(lab, store, tmp_path):
    written = write_fiftyone(store, tmp_path / "out")
    assert written.clips == len(store)
    assert written.left_out == 0
    by_clip = {}
    for kind, folder in written.folders.items():
        metadata = json.loads((folder / "metadata.json").read_text())
        entries = json.loads((folder / "samples.json").read_text())["samples"]
        assert metadata["media_type"] == kind
        known = {field["name"] for field in metadata["sample_fields"]} | {"_id"}
        assert all(set(entry) <= known for entry in entries)  # a field that is not declared is an error on loading
        assert all(entry["_media_type"] == kind for entry in entries)
        by_clip |= {entry["clip_id"]: entry for entry in entries}
    assert set(by_clip) == set(store.clips["clip_id"].to_pylist())
    assert len({entry["_id"]["$oid"] for entry in by_clip.values()}) == len(by_clip)
    asked = {sample.clip_id: sample for sample in store.samples() if sample.clip_id}
    for row in store.clips.to_pylist():
        entry = by_clip[row["clip_id"]]
        assert Path(entry["filepath"]) == lab.root.absolute() / row["path"]
        (mean,) = store.read([row["clip_id"]], encoder="siglip", pool="mean")
        np.testing.assert_array_equal(vector_of(entry["siglip"]), mean)
        if sample := asked.get(row["clip_id"]):
            assert sample.turns[0].text in entry["questions"]
            assert sample.turns[1].text in entry["answers"]
            assert sample.split in entry["tags"]


def test_a_clip_without_its_media_is_counted_and_left_out(lab, store, tmp_path):
    root = lab.copy_of_root()
    (root / "valley/v8.mp4").unlink()
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["fiftyone", str(lab.store), "--root", str(root), "--out", str(out)])
    assert done.exit_code == EXIT_WITH_FAILURES, done.output
    assert f"1 of {len(store)} clips" in done.stderr
    assert "v8.mp4" not in (out / "video/samples.json").read_text()
    with pytest.raises(UserError, match="exists"):
        write_fiftyone(store, out)
    with pytest.raises(UserError, match="no clip"):
        write_fiftyone(store, tmp_path / "other", root=str(tmp_path))
    assert not (tmp_path / "other").exists()
