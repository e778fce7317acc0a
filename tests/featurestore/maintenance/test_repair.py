"""Damage is mended, and nothing else is touched."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from featurestore.clip_names import clip_of_id
from featurestore.clips import Clip
from featurestore.maintenance.findings import is_damaged
from featurestore.maintenance.repair import Recomputed, repair_store
from featurestore.maintenance.verify import verify_store
from featurestore.objects.local import LocalObjects
from featurestore.records import MAX_JOURNAL_BYTES, journal_bytes
from featurestore.store import FeatureStore
from tests.featurestore.sound_store import build

pytestmark = pytest.mark.slow

HUGE_BYTES = 3 << 30


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sound") / "store.zarr").path


@pytest.fixture
def store(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "copy.zarr")
    return tmp_path / "copy.zarr"


def content(store: Path) -> dict[str, tuple[bytes, int, int]]:
    """Key -> bytes, inode and mtime."""
    files = (file for file in store.rglob("*") if file.is_file() and file.relative_to(store).parts[0] != "tmp")
    return {
        file.relative_to(store).as_posix(): (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime_ns)
        for file in files
    }


def only_bytes(store: Path) -> dict[str, bytes]:
    return {key: entry[0] for key, entry in content(store).items()}


def flip(file: Path, place: int, bit: int = 3) -> None:
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 1 << bit
    file.write_bytes(data)


def wreck(file: Path) -> None:
    """Damage that no search for one bit can undo."""
    data = bytearray(file.read_bytes())
    for place in (len(data) // 3, len(data) // 2, len(data) - 5):
        data[place] ^= 0x55
    file.write_bytes(data)


def shard_of(store: Path) -> Path:
    return next((store / "video").glob("dinov2-*/tokens/c/0/0/0/0/0"))


def test_a_sound_store_is_left_exactly_as_it_is(store):
    before = content(store)
    assert repair_store(store) == []
    assert content(store) == before


def one_of_each_kind(store: Path) -> list[str]:
    return list({(key.split("/")[0], key.count("/"), Path(key).suffix): key for key in only_bytes(store)}.values())


@pytest.mark.parametrize("with_copy", [False, True])
def test_one_flipped_bit_in_a_shard_or_zarr_json_is_undone_without_any_copy_and_in_any_file_with_one(
    store, sound, with_copy
):
    rng, before = random.Random(1), only_bytes(store)
    for key in one_of_each_kind(store):
        if not with_copy and "/c/" not in key and not key.endswith("zarr.json"):
            continue
        stays = {other: entry for other, entry in content(store).items() if other != key}
        flip(store / key, rng.randrange(len(before[key])), rng.randrange(8))
        done = repair_store(store, other=sound if with_copy else None)
        assert [(each.key, each.is_mended) for each in done] == [(key, True)], key
        assert only_bytes(store) == before, key
        after = content(store)
        assert {other: after[other] for other in stays} == stays, "nothing undamaged is touched"


WITHOUT_A_COPY = {
    "receipts/video/dinov2-*/00000000.json": "made again from the shards and the snapshot, number 2",
    "clips/part-00000.parquet": "made again from the snapshot, to the digest that it had",
    "snapshots/*.json": "removed, the whole snapshot",
    "journal/*.json": "removed: it recorded a run",
    "canaries/video/dinov2-*": "removed, no whole copy is known",
    "samples/*.parquet": "no copy of it is known",
    "tombstones/*.json": "must not be lost",
}


@pytest.mark.parametrize("pattern", WITHOUT_A_COPY)
def test_one_flipped_bit_in_a_file_without_a_crc_is_derived_or_given_up(store, pattern):
    file = sorted(store.glob(pattern))[-1]
    flip(file, file.stat().st_size // 2)
    done, words = repair_store(store)[0], WITHOUT_A_COPY[pattern]
    assert done.key == file.relative_to(store).as_posix()
    assert words in done.done
    assert is_damaged(verify_store(store, "full")) is (not done.is_mended)


def test_a_flip_that_the_crc_places_elsewhere_is_not_accepted(store):
    shard, before = shard_of(store), shard_of(store).read_bytes()
    data = bytearray(before)
    for place in (10, 20, 30):  # three bits, which may look like a single one elsewhere
        data[place] ^= 1
    shard.write_bytes(data)
    (left,) = repair_store(store)
    assert not left.is_mended
    assert shard.read_bytes() == bytes(data)


def test_a_shard_is_fetched_from_another_copy(store, sound):
    before = content(store)
    wreck(shard_of(store))
    key = shard_of(store).relative_to(store).as_posix()
    (left,) = repair_store(store)
    assert not left.is_mended
    assert "no other copy has it; give --from OTHER_STORE" in left.done
    (done,) = repair_store(store, other=sound)
    assert (done.key, done.done, done.is_mended) == (key, "fetched from the other copy", True)
    after = content(store)
    assert after[key][0] == before[key][0]
    assert {k: v for k, v in after.items() if k != key} == {k: v for k, v in before.items() if k != key}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("zarr.json", "made again from what it describes"),
        ("video/zarr.json", "made again from what it describes"),
        ("video/vivit-*/zarr.json", "made again from what it describes"),
        ("video/vivit-*/scale/zarr.json", "made again from what it describes"),
        ("video/siglip-*/tokens/zarr.json", "made again from what it describes"),
    ],
)
@pytest.mark.parametrize("how", [wreck, Path.unlink])
def test_documents_are_made_again_from_what_they_describe(store, pattern, words, how):
    before = only_bytes(store)
    (file,) = store.glob(pattern)
    how(file)
    done = repair_store(store)
    assert [(each.done, each.is_mended) for each in done] == [(words, True)]
    assert only_bytes(store) == before


def test_a_snapshot_that_nothing_restores_is_removed_and_made_again(store, sound):
    newest = FeatureStore.open(store).snapshot
    clips = FeatureStore.open(store).clips
    wreck(store / "snapshots" / f"{newest}.json")
    (done, *_) = repair_store(store)
    assert done.done == "removed, the whole snapshot: a new one is made from the receipts"
    assert FeatureStore.open(store).clips.equals(clips)
    assert not is_damaged(verify_store(store, "full"))


def test_a_journal_that_nothing_restores_is_removed_with_words(store, sound):
    (file,) = (store / "journal").iterdir()
    wreck(file)
    assert [each.done for each in repair_store(store)] == ["removed: it recorded a run, no tokens depend on it"]
    assert not verify_store(store, "full")


@pytest.mark.parametrize(
    "key",
    [
        *("receipts/elsewhere", "receipts/video/dinov2/00000000.json", "receipts/x/y/z/00000000.json"),
        *("snapshots/newest.json", "journal/run/1.json", "tombstones/x.json", "samples/a", "thesis/draft.tex"),
    ],
)
def test_a_link_under_a_name_that_no_store_has_is_left_and_named(store, key):
    (store / key).parent.mkdir(parents=True, exist_ok=True)
    (store / key).symlink_to(store / "zarr.json")
    (left,) = repair_store(store)
    assert (left.key, left.is_mended) == (key, False)
    assert (store / key).is_symlink()


def test_a_link_in_the_place_of_a_record_is_left_and_named(store):
    record = sorted((store / "snapshots").glob("*.json"))[-1]
    record.rename(store / "elsewhere")
    record.symlink_to(store / "elsewhere")
    left = next(each for each in repair_store(store) if each.key == record.relative_to(store).as_posix())
    assert "a store holds no symbolic links, put the file there" in left.done
    assert record.is_symlink()


def test_a_receipt_that_is_lost_is_made_again_with_a_number(store, sound):
    tokens = FeatureStore.open(store)
    ids = tokens.clips.filter(tokens.clips["dinov2"])["clip_id"].to_pylist()
    expected = tokens.data_digest(ids, ["dinov2"])
    file = next((store / "receipts/video").glob("dinov2-*/00000000.json"))
    file.unlink()
    (done,) = repair_store(store)
    assert done.is_mended
    assert "made again from the shards and the snapshot, number 2" in done.done
    assert not verify_store(store, "full")
    assert FeatureStore.open(store).data_digest(ids, ["dinov2"]) == expected


def test_a_clip_part_and_a_tombstone_are_fetched_or_said_to_be_lost(store, sound):
    before = only_bytes(store)
    part, tombstone = store / "clips/part-00001.parquet", next((store / "tombstones").iterdir())  # a retry's part
    wreck(part)
    wreck(tombstone)
    words = {each.key.split("/")[0]: each for each in repair_store(store)}
    assert not words["clips"].is_mended
    assert "without it the clips of its rows are unknown" in words["clips"].done
    assert "must not be lost" in words["tombstones"].done
    repair_store(store, other=sound)
    assert only_bytes(store) == before


@pytest.mark.parametrize(
    "pattern",
    [
        *("clips/part-00001.parquet", "samples/*.parquet", "snapshots/*.json", "snapshots/*.parquet", "journal/*.json"),
        *("receipts/video/dinov2-*/00000000.json", "tombstones/*.json", "canaries/video/dinov2-*"),
        "video/dinov2-*/tokens/c/0/0/0/0/0",
    ],
)
def test_a_copy_with_more_bytes_than_such_a_file_can_need_is_not_read(store, sound, tmp_path, monkeypatch, pattern):
    (file,) = sorted(store.glob(pattern))[-1:]
    other = shutil.copytree(sound, tmp_path / "other.zarr")
    os.truncate(other / file.relative_to(store), HUGE_BYTES)  # sparse: it takes no space
    wreck(file)
    real = LocalObjects.get

    def get(objects: LocalObjects, key: str, **bounds) -> bytes:
        data = real(objects, key, **bounds)  # raises where the file is larger than the bound
        assert len(data) < HUGE_BYTES, f"{key} is read"
        return data

    monkeypatch.setattr(LocalObjects, "get", get)
    assert all("fetched" not in each.done for each in repair_store(store, other=other))


def test_a_journal_of_the_other_copy_is_fetched_unless_it_is_larger_than_any_can_be(store, sound, tmp_path):
    (file,) = (store / "journal").iterdir()
    other = shutil.copytree(sound, tmp_path / "other.zarr")
    (other / "journal" / file.name).write_bytes(journal_bytes({"words": "few"}))
    wreck(file)
    assert [each.done for each in repair_store(store, other=other)] == ["fetched from the other copy"]
    (other / "journal" / file.name).write_bytes(journal_bytes({"words": "x" * MAX_JOURNAL_BYTES}))
    wreck(file)
    assert "removed" in repair_store(store, other=other)[0].done


@pytest.mark.parametrize("how", [wreck, Path.unlink])
def test_a_clip_part_is_made_again_from_the_snapshot_to_the_byte(store, how):
    before = only_bytes(store)
    how(store / "clips/part-00000.parquet")
    (done, *_) = repair_store(store)
    assert (done.key, done.done) == (
        "clips/part-00000.parquet",
        "made again from the snapshot, to the digest that it had",
    )
    assert only_bytes(store) == before


@pytest.mark.parametrize(
    "clip",
    [
        Clip(dataset="d", path="a/b%25#c.mp4", kind="video"),
        Clip(dataset="d", path="a#t=1,2", kind="video", start_s=0.1, end_s=2.5),
        Clip(dataset="d", path="a%23.mp4", kind="video", start_s=3.0),
        Clip(dataset="d", path="a.mp4", kind="video", end_s=1e-7),
        Clip(dataset="d", path="a.jpg", kind="image"),
        Clip(dataset="d", path="a.mp4", kind="video", end_frame=0),
    ],
)
def test_a_clips_id_says_all_of_it(clip):
    assert clip_of_id(clip.clip_id, clip.kind) == clip


def test_a_block_computed_again_is_put_back_only_if_its_bytes_are_the_receipts(store, sound):
    good = {shard_of(store).parts[-7]: shard_of(store).read_bytes()}
    wreck(shard_of(store))

    def recompute(group, receipt):
        return Recomputed(receipt=receipt, shards={"tokens": next(iter(good.values()))})

    (done,) = repair_store(store, recompute=recompute)
    assert (done.done, done.is_mended) == ("computed again from the media, the same bytes", True)
    assert not verify_store(store, "full")


def test_other_bytes_are_refused_unless_asked_for_and_then_get_a_numbered_receipt(store, make, tmp_path):
    import dataclasses

    other = make.kit(tmp_path / "elsewhere.zarr")  # another machine: the same clips, other bits
    other.writer().add_clips([*(make.video(n) for n in range(6)), *(make.image(n) for n in range(2))])
    other.fill(broken=("videos/1.mp4", "videos/3.mp4"), noise=1)
    remote = other.group(make.identity())
    shard = (other.path / "video" / remote.name / "tokens/c/0/0/0/0/0").read_bytes()
    wreck(shard_of(store))
    before = only_bytes(store)

    def recompute(group, receipt):
        assert [row.state for row in receipt.rows] == ["ok", "failed", "ok", "skipped"]
        rows = (*remote.receipt(0).rows[:3], dataclasses.replace(receipt.rows[3]))
        return Recomputed(receipt=dataclasses.replace(remote.receipt(0), rows=rows), shards={"tokens": shard})

    (refused,) = repair_store(store, recompute=recompute)
    assert not refused.is_mended
    assert "this machine gives other bytes" in refused.done
    assert "--new-bytes" in refused.done
    assert only_bytes(store) == before
    (taken,) = repair_store(store, recompute=recompute, new_bytes=True)
    assert "receipt number 3" in taken.done  # the second was the removal's
    assert not verify_store(store, "full")


def test_a_repair_that_was_killed_is_finished_by_the_same_command(store, sound):
    before = only_bytes(store)
    program = (
        "import os, signal, sys; from featurestore.objects import local as local_objects\n"
        "from featurestore.maintenance import repair\n"
        "left = int(sys.argv[3]); real = local_objects.LocalObjects.replace\n"
        "def replace(self, key, data):\n"
        "    global left\n"
        "    if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left -= 1; real(self, key, data)\n"
        "local_objects.LocalObjects.replace = replace\n"
        "repair.repair_store(sys.argv[1], other=sys.argv[2])\n"
    )
    for pattern in ("zarr.json", "receipts/video/*/00000000.json", "video/*/tokens/c/0/0/0/0/0"):
        for file in store.glob(pattern):
            wreck(file)
    codes = []
    while not codes or codes[-1] != 0:
        done = subprocess.run([sys.executable, "-c", program, str(store), str(sound), "2"], check=False)
        codes.append(done.returncode)
        assert done.returncode in (0, -signal.SIGKILL)
    assert len(codes) > 2
    assert only_bytes(store) == before
    assert os.path.isdir(store)
