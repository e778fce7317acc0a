"""Canaries: a plain safetensors file per group, whole or refused, named by snapshots, carried wherever a store goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from featurestore import FeatureStore, verify_store
from featurestore.maintenance.repair import repair_store
from featurestore.maintenance.tombstone import tombstone
from featurestore.objects.open import open_objects
from featurestore.reference_clips import MAX_HEADER_BYTES, ReferenceClips, read_reference_clips
from featurestore.transfer.export import FORMATS, ExportCells, export
from featurestore.transfer.merge import StoreCells, combine
from featurestore.transfer.selection import Selection
from featurestore.transfer.sync import transfer
from mervcache.errors import MediaError, MervCacheError, StoreDamagedError, StoreFormatError, UserError

DTYPES = ("float16", "bfloat16", "uint8")


@pytest.fixture
def full(make, tmp_path):
    """Two encoders, both kinds, canaries of both encoders, named by the newest snapshot."""
    kit = make.kit(tmp_path / "full.zarr")
    kit.writer().add_clips([*(make.video(n) for n in range(4)), make.image(0)])
    for identity in (make.identity(), make.identity(encoder="vivit", storage_dtype="uint8", prefix_tokens=2)):
        kit.fill(identity)
        kit.add_reference_clips(identity)
    return kit


def files(store: Path) -> dict[str, bytes]:
    return {f.relative_to(store).as_posix(): f.read_bytes() for f in sorted((store / "canaries").rglob("*.*"))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["video", "image"])
def test_the_file_is_safetensors_that_any_reader_opens_and_ours_reads_back(make, kind, dtype):
    identity = make.identity(storage_dtype=dtype, prefix_tokens=2)
    canaries = make.canaries(kind, identity)
    data = canaries.to_bytes()
    opened = load(data)
    assert set(opened) == set(canaries.arrays)
    for name, items in canaries.arrays.items():
        assert np.array_equal(opened[name], items)
        assert opened[name].shape[0] == 2
    assert int.from_bytes(data[:8], "little") % 8 == 0
    again = ReferenceClips.parse(data, kind, identity)
    assert again.clips == canaries.clips
    assert again.to_bytes() == data


def test_a_row_is_found_by_the_canarys_name(make):
    canaries = make.canaries("video", make.identity())
    assert np.array_equal(canaries.stored("noise")["tokens"], canaries.arrays["tokens"][1])
    assert canaries.stored("still") is None


def test_a_group_whose_tokens_overflowed_has_a_file_without_rows(make):
    identity = make.identity()
    empty = {"tokens": np.empty((0, *identity.grid, identity.width), np.float16)}
    canaries = ReferenceClips(kind="video", identity=identity, rendering="canaries/1", clips=(), arrays=empty)
    assert ReferenceClips.parse(canaries.to_bytes(), "video", identity).clips == ()


def test_no_flipped_bit_goes_unseen(make):
    identity = make.identity(grid=(2, 1, 1), width=4)
    data = make.canaries("video", identity).to_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises((StoreDamagedError, StoreFormatError)):
            ReferenceClips.parse(bytes(changed), "video", identity)


def test_another_groups_canaries_are_refused(make):
    data = make.canaries("video", make.identity()).to_bytes()
    with pytest.raises((StoreDamagedError, StoreFormatError)):
        ReferenceClips.parse(data, "video", make.identity(layer="another layer"))
    with pytest.raises((StoreDamagedError, StoreFormatError)):
        ReferenceClips.parse(make.canaries("image", make.identity()).to_bytes(), "video", make.identity())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    head=st.one_of(
        st.binary(max_size=64),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=8),
            lambda inner: st.dictionaries(st.sampled_from(["__metadata__", "canaries", "digest", "tokens"]), inner),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    ),
    size=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    rest=st.binary(max_size=64),
)
def test_a_strangers_bytes_are_an_error_of_ours_or_nothing(make, head, size, rest):
    data = (len(head) if size is None else size).to_bytes(8, "little") + head + rest
    with pytest.raises(MervCacheError):
        ReferenceClips.parse(data, "video", make.identity())


def test_a_file_larger_than_its_identity_allows_is_not_loaded(full, make):
    file = next((full.path / "canaries/video").glob("dinov2-*"))
    with file.open("ab") as sink:
        sink.truncate(MAX_HEADER_BYTES + (1 << 20))
    with pytest.raises(StoreFormatError, match="more than the"):
        read_reference_clips(open_objects(full.path), "video", make.identity())


def test_the_newest_snapshot_names_them_and_one_without_them_reads_as_before(full, kit, make):
    store = full.open()
    groups = {f"{kind}/{identity.group_name}" for kind in ("video", "image") for identity in store.encoders.values()}
    assert set(store.canaries) == groups
    kit.writer().add_clips([make.video(0)])
    kit.fill()
    (record,) = (kit.path / "snapshots").glob("*.json")
    assert kit.open().canaries == {}
    assert "canaries" not in json.loads(record.read_text())


def test_what_is_added_later_changes_no_byte_that_was_there(kit, make):
    kit.writer().add_clips([make.video(0)])
    kit.fill()
    before = {file: file.read_bytes() for file in kit.path.rglob("*") if file.is_file()}
    kit.add_reference_clips()
    assert {file: file.read_bytes() for file in before} == before
    assert verify_store(kit.path, "full") == []


def test_who_is_first_wins(full, make):
    before = files(full.path)
    full.add_reference_clips(noise=1)
    assert files(full.path) == before


def test_a_lost_file_and_a_foreign_one_are_found(full):
    lost = next((full.path / "canaries/image").iterdir())
    orphan = full.path / "canaries/video/other-0123456789ab.safetensors"
    orphan.write_bytes(lost.read_bytes())
    lost.unlink()
    found = {finding.key: finding.severity for finding in verify_store(full.path)}
    assert found == {
        lost.relative_to(full.path).as_posix(): "damage",
        orphan.relative_to(full.path).as_posix(): "orphan",
    }


def test_repair_fetches_them_or_lets_the_next_extract_make_them_again(full, tmp_path):
    shutil.copytree(full.path, tmp_path / "copy.zarr")
    before, key = files(full.path), next(iter(files(full.path)))
    (full.path / key).unlink()
    (done,) = repair_store(full.path, other=tmp_path / "copy.zarr")
    assert (done.key, done.done) == (key, "fetched from the other copy")
    assert files(full.path) == before
    (full.path / key).write_bytes(before[key][:-40] + bytes(40))
    (done,) = repair_store(full.path)
    assert "the next extract with this encoder computes it again" in done.done
    assert verify_store(full.path, "full") == []
    assert len(full.open().canaries) == 3


def test_a_decoder_that_cannot_read_the_canaries_ends_no_repair(full):
    def undecodable(kind, identity):
        raise MediaError("no decoder for rawvideo")

    for key in files(full.path):
        (full.path / key).unlink()
    done = repair_store(full.path, make_reference_clips=undecodable)
    assert {(each.done, each.is_mended) for each in done} == {("cannot be made again: no decoder for rawvideo", False)}
    assert len(done) == 4


def test_a_tombstone_leaves_them_alone(full, make):
    before = files(full.path)
    tombstone(full.path, [make.video(0).clip_id], reason="withdrawn")
    assert files(full.path) == before
    assert len(full.open().canaries) == 4
    assert verify_store(full.path, "full") == []


def test_a_pull_brings_them_and_a_part_brings_its_own(full, tmp_path):
    transfer(full.path, tmp_path / "whole.zarr")
    assert files(tmp_path / "whole.zarr") == files(full.path)
    transfer(full.path, tmp_path / "part.zarr", selection=Selection(encoders=("vivit",), kind="video"))
    assert [Path(key).name.split("-")[0] for key in files(tmp_path / "part.zarr")] == ["vivit"]
    for name in ("whole.zarr", "part.zarr"):
        assert verify_store(tmp_path / name, "full") == []
        assert FeatureStore.open(tmp_path / name).canaries.items() <= full.open().canaries.items()


def test_what_was_checked_travels_without_the_journals_of_hosts(full, tmp_path):
    writer = full.writer()
    writer.journal("run-1-driver", {"host": "h"})
    writer.journal("parity-0123456789ab", {"format": 1})
    transfer(full.path, tmp_path / "pulled.zarr", with_journal=False)
    assert [file.name for file in (tmp_path / "pulled.zarr/journal").iterdir()] == ["parity-0123456789ab.json"]


def test_a_damaged_one_is_not_sent_and_another_machines_is_not_overwritten(full, make, tmp_path):
    transfer(full.path, tmp_path / "pulled.zarr")
    key = next(iter(files(full.path)))
    sound = (full.path / key).read_bytes()
    (full.path / key).write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(StoreDamagedError, match="does not match the snapshot's digest"):
        transfer(full.path, tmp_path / "other.zarr")
    (full.path / key).write_bytes(sound)
    (tmp_path / "pulled.zarr" / key).write_bytes(make.canaries("image", make.identity(), 1).to_bytes())
    with pytest.raises(UserError, match="the destination holds other bytes under canaries/"):
        transfer(full.path, tmp_path / "pulled.zarr", check=True)
    shutil.rmtree(tmp_path / "pulled.zarr/snapshots")  # nothing names the bytes there
    with pytest.raises(UserError, match="the destination holds other bytes under canaries/"):
        transfer(full.path, tmp_path / "pulled.zarr")


def test_a_union_takes_the_first_that_there_are(full, make, tmp_path):
    without = make.kit(tmp_path / "without.zarr")
    without.writer().add_clips([make.video(9)])
    without.fill()
    other = make.kit(tmp_path / "other.zarr")
    other.writer().add_clips([make.video(8)])
    other.fill()
    other.add_reference_clips(noise=1)
    combine([StoreCells(without.path), StoreCells(full.path), StoreCells(other.path)], tmp_path / "union.zarr")
    assert files(tmp_path / "union.zarr") == files(full.path)
    assert verify_store(tmp_path / "union.zarr", "full") == []


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_carries_them(full, tmp_path, format):
    export(StoreCells(full.path), tmp_path / "export", format=format)
    combine([ExportCells(tmp_path / "export")], tmp_path / "back.zarr")
    assert files(tmp_path / "back.zarr") == files(full.path)


KILLED = """
import os, signal, sys
from tests.featurestore.conftest import Kit
from featurestore.objects import local as local_objects
real = getattr(local_objects.os, sys.argv[2])
def die(*arguments, **options):
    if "canaries" in str(arguments) or sys.argv[2] == "fsync":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(local_objects.os, sys.argv[2], die)
Kit(sys.argv[1]).add_reference_clips()
"""


@pytest.mark.parametrize("moment", ["fsync", "link"])
def test_killed_while_they_are_put_nothing_is_lost_and_the_same_call_finishes(kit, make, moment):
    kit.writer().add_clips([make.video(0)])
    kit.fill()
    before = kit.open().snapshot
    command = [sys.executable, "-c", KILLED, str(kit.path), moment]
    root = Path(__file__).resolve().parents[2]
    died = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": str(root)}, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert files(kit.path) == {}
    assert kit.open().snapshot == before
    assert not [finding for finding in verify_store(kit.path, "full") if finding.severity == "damage"]
    kit.add_reference_clips()
    assert len(files(kit.path)) == 1
    assert verify_store(kit.path, "full") == [] or all(f.key.startswith("tmp/") for f in verify_store(kit.path))
