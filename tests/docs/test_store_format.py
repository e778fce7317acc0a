"""docs/store-format.md is enough to read a store: a reader made from it agrees with ours, bit for bit."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from featurestore import FeatureStore
from tests.docs import minimal_reader
from tests.docs.minimal_reader import Reader, record_digest
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def old_store(tmp_path_factory):
    """Six encoders in every storage dtype, stills, prefix tokens, removed, retried and quarantined clips."""
    folder = tmp_path_factory.mktemp("format1")
    with tarfile.open(ROOT / "tests/format1/format1.tar.xz") as archive:
        members = [member for member in archive.getmembers() if member.name.startswith("store.zarr")]
        archive.extractall(folder, members=members, filter="data")
    return folder / "store.zarr"


@pytest.fixture(params=["new", "old"])
def store_path(request) -> Path:
    return (
        request.getfixturevalue("made_once") / "features/demo.zarr"
        if request.param == "new"
        else request.getfixturevalue("old_store")
    )


def test_every_value_is_the_same_to_the_bit(store_path):
    ours, reader = FeatureStore.open(store_path), Reader(store_path)
    assert reader.snapshot == ours.snapshot
    assert set(reader.identities) == {identity.group_name for identity in ours.encoders.values()}
    compared = 0
    for key, identity in ours.encoders.items():
        group, clips = identity.group_name, ours.clips.filter(ours.clips[key])["clip_id"].to_pylist()
        assert reader.clips(group) == clips
        for clip in clips:
            for array, read in (("tokens", ours.read), ("prefix", ours.read_prefix)):
                if array == "tokens" or identity.prefix_tokens:
                    theirs, (mine,) = reader.read(group, clip, array), read([clip], encoder=key)
                    assert (theirs.dtype, theirs.shape) == (mine.dtype, mine.shape)
                    assert theirs.tobytes() == mine.tobytes(), f"{array} of {clip} by {key}"
                    compared += 1
            assert reader.row_digest(group, clip) == reader.lines[clip][f"{group}.digest"]
    assert compared >= 40


def test_the_old_store_has_every_case(old_store):
    reader = Reader(old_store)
    assert {identity["storage_dtype"] for identity in reader.identities.values()} == {"float16", "bfloat16", "uint8"}
    assert {line["kind"] for line in reader.lines.values()} == {"video", "image"}
    assert any(identity["prefix_tokens"] for identity in reader.identities.values())
    assert reader.removed
    assert reader.erased


def test_quarantine_and_samples_are_the_same(store_path):
    ours, reader = FeatureStore.open(store_path), Reader(store_path)
    for key, identity in ours.encoders.items():
        rows = [row for row in ours.quarantine.to_pylist() if row["encoder"] == key]
        assert reader.quarantine(identity.group_name) == {row["clip_id"]: row["reason"] for row in rows}
    assert sorted(reader.record["samples"]) == ours.sample_names
    for name in ours.sample_names:
        assert reader.samples(name) == [sample.to_record() for sample in ours.samples(name)]


def test_group_names_and_receipts_follow_the_page(store_path):
    reader = Reader(store_path)
    for group, identity in reader.identities.items():
        assert group == f"{identity['encoder']}-{record_digest(identity)[:12]}"
    for name, entry in reader.record["groups"].items():
        for block, digest in entry["receipts"].items():
            receipt = json.loads((store_path / f"receipts/{name}/{int(block):08d}.json").read_text())
            assert receipt["digest"] == digest == record_digest(receipt)
            for array, shard in receipt["shards"].items():
                axes = {"tokens": 4, "prefix": 3, "scale": 1, "offset": 1}[array]
                data = (store_path / name / array / "c" / block / "/".join(["0"] * axes)).read_bytes()
                assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard["sha256"], shard["bytes"])


def test_a_quarantined_clip_is_refused(old_store):
    ours = FeatureStore.open(old_store)
    (row,) = [row for row in ours.quarantine.to_pylist() if row["scope"] == "clip"][:1]
    with pytest.raises(KeyError):
        Reader(old_store).read(ours.encoders[row["encoder"]].group_name, row["clip_id"])


def test_the_reader_is_short():
    lines = Path(minimal_reader.__file__).read_text().splitlines()
    assert len(lines) < 120
    imports = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import", "from"))}
    assert imports <= {"__future__", "hashlib", "json", "re", "pathlib", "numpy", "pyarrow", "zarr"}


def test_numbers_of_the_page_are_those_of_the_code():
    from featurestore.layout import FORMAT_VERSION, MAX_BLOCK_ROWS
    from featurestore.snapshots import MAX_RECORD_BYTES
    from featurestore.zarr_metadata import MAX_CHUNK_BYTES, MAX_DOCUMENT_BYTES

    text = (ROOT / "docs/store-format.md").read_text()
    assert f"`attributes.merv_cache.format` must be `{FORMAT_VERSION}`" in text
    for size in (f"{MAX_CHUNK_BYTES >> 20} MiB", f"{MAX_BLOCK_ROWS:,} rows", f"{MAX_DOCUMENT_BYTES >> 20} MiB"):
        assert size in text
    assert f"{MAX_RECORD_BYTES >> 20} MiB" in text
