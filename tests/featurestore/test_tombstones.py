"""A clip removed on request is gone: from every listing, every reading, and from the bytes on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from featurestore.clips import Sample, Turn
from featurestore.maintenance.tombstone import clips_of_same_media, erase_tombstoned, tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.records import read_tombstones
from featurestore.shards import encode_row
from featurestore.store import FeatureStore
from featurestore.transfer.merge import StoreCells, combine
from featurestore.transfer.sync import transfer
from mervcache.errors import ClipUnavailableError, StoreDamagedError, StoreError, UserError
from mervcache.files import sha256_hex

pytestmark = pytest.mark.slow

GONE = "tiny/videos/2.mp4"
TURNS = (Turn(role="human", text="what?"), Turn(role="gpt", text="a secret"))


def sample(number: int, clip_id: str | None) -> Sample:
    return Sample(sample_id=str(number), clip_id=clip_id, turns=TURNS, stage="align", source="x")


@pytest.fixture
def filled(kit, make):
    writer = kit.writer()
    writer.add_clips([*(make.video(n) for n in range(6)), make.image(0)])
    writer.add_samples("mix", [sample(1, GONE), sample(2, "tiny/videos/0.mp4"), sample(3, None)])
    kit.fill()
    kit.fill(make.identity(encoder="vivit", storage_dtype="uint8", prefix_tokens=2))
    return kit


def bytes_of_row(kit, make) -> bytes:
    tokens = make.floats(make.video(2), make.identity())["tokens"].astype(np.float16)
    group = kit.group(make.identity())
    return encode_row(group.specs["tokens"], tokens)


def test_readers_no_longer_list_or_read_it_and_say_why(filled):
    before = filled.open()
    tombstone(filled.path, [GONE], reason="the consent was withdrawn", date="2026-11-20")
    for store in (filled.open(), FeatureStore.open(filled.path, snapshot=before.snapshot)):
        assert GONE not in store.clips["clip_id"].to_pylist()
        assert len(store) == store.clips.num_rows == 6
        assert store.info()["clips"] == {"video": 5, "image": 1}
        assert GONE not in store.quarantine["clip_id"].to_pylist()
        with pytest.raises(ClipUnavailableError, match=r"was removed .* on 2026-11-20: the consent was withdrawn"):
            store.read([GONE], encoder="dinov2")
        with pytest.raises(ClipUnavailableError, match="was removed"):
            store.data_digest([GONE], ["dinov2"])
    (stone,) = filled.open().tombstones.values()
    assert (stone.clips, stone.reason) == ((GONE,), "the consent was withdrawn")


def test_its_bytes_are_in_no_file_and_all_others_read_as_before(filled, make):
    before, needle = filled.open(), bytes_of_row(filled, make)
    others = [clip for clip in before.clips["clip_id"].to_pylist() if clip != GONE]
    expected = {key: before.read(others, encoder=key) for key in before.encoders}
    files = lambda: [file for file in filled.path.rglob("*") if file.is_file()]  # noqa: E731
    assert any(needle in file.read_bytes() for file in files())
    tombstone(filled.path, [GONE], reason="licence")
    assert not any(needle in file.read_bytes() for file in files())
    after = filled.open()
    for key, tokens in expected.items():
        np.testing.assert_array_equal(after.read(others, encoder=key), tokens)
    assert verify_store(filled.path, "full") == []


def test_its_conversations_are_in_no_version_of_the_samples(filled):
    old = filled.open()
    tombstone(filled.path, [GONE], reason="licence")
    assert [s.sample_id for s in filled.open().samples("mix")] == ["2", "3"]
    assert [file.name for file in (filled.path / "samples").iterdir()] == ["mix.2.parquet"]
    with pytest.raises(StoreError, match=r"removed on .*; open the newest snapshot"):
        FeatureStore.open(filled.path, snapshot=old.snapshot).samples()
    filled.writer().add_samples("mix", [sample(1, GONE), sample(2, "tiny/videos/0.mp4"), sample(3, None)])
    assert [file.name for file in (filled.path / "samples").iterdir()] == ["mix.2.parquet"]  # the same as it is


def test_the_receipt_counts_and_names_the_one_before(filled, make):
    before = filled.group(make.identity()).receipt(0)
    other = filled.group(make.identity()).receipt(1)
    tombstone(filled.path, [GONE], reason="licence")
    group = filled.group(make.identity())
    after = group.receipt(0)
    assert (after.generation, after.replaces) == (2, before.digest)
    assert [row.state for row in after.rows] == ["ok", "ok", "skipped", "ok"]
    assert after.rows[:2] == before.rows[:2]
    assert group.receipt(1) == other  # a block without the clip is not touched


def test_it_gets_no_row_again_and_is_never_computed_again(filled, make):
    tombstone(filled.path, [GONE], reason="licence")
    writer = filled.writer()
    assert writer.add_clips([make.video(2)], retry=True) == []
    assert [clip.clip_id for _, clip in writer.add_clips([make.video(2), make.video(30)])] == ["tiny/videos/30.mp4"]


def test_a_clip_with_several_rows_is_erased_from_all_of_them(kit, make):
    kit.writer().add_clips([make.video(n) for n in range(3)])
    kit.fill(broken=("videos/2.mp4",))
    kit.writer().add_clips([make.video(2)], retry=True)
    kit.fill()
    tombstone(kit.path, [GONE], reason="licence")
    group = kit.group(make.identity())
    assert [group.receipt(block).rows[place].state for block, place in ((0, 2), (1, 0))] == ["skipped", "skipped"]
    assert verify_store(kit.path, "full") == []


def test_the_row_of_a_shard_without_a_receipt_is_erased_too(filled, make):
    group = filled.group(make.identity())
    (filled.path / "receipts" / "video" / group.name / "00000000.json").unlink()
    needle = bytes_of_row(filled, make)
    tombstone(filled.path, [GONE], reason="licence")
    shard = filled.path / "video" / group.name / "tokens/c/0/0/0/0/0"
    assert needle not in shard.read_bytes()


def test_another_store_takes_the_removal_over_with_the_record(filled, make, tmp_path):
    import shutil

    shutil.copytree(filled.path, tmp_path / "copy.zarr")
    tombstone(filled.path, [GONE], reason="licence")
    shutil.copytree(filled.path / "tombstones", tmp_path / "copy.zarr/tombstones")
    copy = type(filled)(tmp_path / "copy.zarr")
    assert GONE not in copy.open().clips["clip_id"].to_pylist()  # from the record on
    assert erase_tombstoned(copy.writer()) == 2
    copy.writer().publish_snapshot()
    assert verify_store(copy.path, "full") == []
    assert erase_tombstoned(copy.writer()) == 0
    same = lambda path: {  # noqa: E731
        file.relative_to(path): file.read_bytes()
        for top in ("video", "receipts", "clips", "samples", "tombstones")
        for file in (path / top).rglob("*")
        if file.is_file()
    }
    assert same(copy.path) == same(filled.path)


def test_a_removal_that_was_killed_is_finished_by_the_same_command(filled, make, tmp_path):
    program = (
        "import os, signal, sys; from featurestore.objects import local as local_objects\n"
        "from featurestore.maintenance import tombstone as erase\n"
        "left = int(sys.argv[2]); real = local_objects.LocalObjects.replace\n"
        "def replace(self, key, data):\n"
        "    global left\n"
        "    if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left -= 1; real(self, key, data)\n"
        "local_objects.LocalObjects.replace = replace\n"
        f"erase.tombstone(sys.argv[1], [{GONE!r}], reason='licence', date='2026-11-20')\n"
    )
    for left in range(6):
        done = subprocess.run([sys.executable, "-c", program, str(filled.path), str(left)], check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        assert GONE not in filled.open().clips["clip_id"].to_pylist()
    assert left > 1
    tombstone(filled.path, [GONE], reason="licence", date="2026-11-20")
    assert verify_store(filled.path, "full") == []
    assert len(read_tombstones(filled.writer().objects)) == 1


def test_damage_is_not_put_under_a_new_receipt(filled, make):
    group = filled.group(make.identity())
    shard = filled.path / "video" / group.name / "tokens/c/0/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreDamagedError, match="does not match its checksum; run `merv-pipeline verify`"):
        tombstone(filled.path, [GONE], reason="licence")
    assert shard.read_bytes() == bytes(data)
    assert GONE not in filled.open().clips["clip_id"].to_pylist()


def test_a_damaged_record_opens_no_store(filled):
    tombstone(filled.path, [GONE], reason="licence")
    (file,) = (filled.path / "tombstones").iterdir()
    file.write_bytes(file.read_bytes().replace(b"videos/2", b"videos/3"))
    with pytest.raises(StoreDamagedError, match="must not be lost"):
        filled.open()
    assert any(finding.key == f"tombstones/{file.name}" for finding in verify_store(filled.path))
    os.unlink(file)
    assert ("is missing though the newest snapshot names it") in str(verify_store(filled.path))


def test_mistakes_are_told(filled):
    with pytest.raises(
        UserError, match=r"no clip of this store is named 'tiny/videos/2.mpg'; near: .*tiny/videos/2\.mp4"
    ):
        tombstone(filled.path, ["tiny/videos/2.mpg"], reason="x")
    with pytest.raises(UserError, match="needs a reason"):
        tombstone(filled.path, [GONE], reason=" ")
    with pytest.raises(UserError, match="at least one clip"):
        tombstone(filled.path, [], reason="x")


def test_a_push_brings_the_removal_and_what_came_before_it_is_erased_there(filled, tmp_path):
    there = type(filled)(tmp_path / "there.zarr")
    transfer(filled.path, there.path)
    assert GONE in there.open().clips["clip_id"].to_pylist()
    tombstone(filled.path, [GONE], reason="licence")
    transfer(filled.path, there.path)
    assert GONE not in there.open().clips["clip_id"].to_pylist()
    assert there.open().snapshot == filled.open().snapshot
    assert [file.name for file in (there.path / "samples").iterdir()] == ["mix.2.parquet"]
    assert verify_store(there.path, "full") == []
    tombstone(filled.path, ["tiny/videos/0.mp4"], reason="another one")  # in the same block
    transfer(filled.path, there.path)
    assert verify_store(there.path, "full") == []
    assert len(there.open().tombstones) == 2


def test_a_union_leaves_out_what_any_of_its_sources_removed(filled, make, tmp_path):
    other = make.kit(tmp_path / "other.zarr")
    other.writer().add_clips([make.video(2), make.video(9)])
    other.writer().add_samples("mix", [sample(7, GONE), sample(8, "tiny/videos/9.mp4")])
    other.fill()
    tombstone(filled.path, [GONE], reason="licence")
    out = type(filled)(tmp_path / "union.zarr")
    assert combine([StoreCells(other.path), StoreCells(filled.path)], out.path).removed == 1
    store = out.open()
    assert GONE not in store.clips["clip_id"].to_pylist()
    assert "tiny/videos/9.mp4" in store.clips["clip_id"].to_pylist()
    assert GONE not in {s.clip_id for s in store.samples()}
    assert [stone.reason for stone in store.tombstones.values()] == ["licence"]
    assert out.writer().add_clips([make.video(2)]) == []
    assert verify_store(out.path, "full") == []


@pytest.fixture
def twice(kit, make):
    """The file behind videos/2.mp4 is in another dataset as well, in two spans, and failed there for one encoder."""
    kit.media = lambda clip: sha256_hex(clip.path.replace("films/two", "videos/2").encode())
    other = make.video(0, dataset="other")
    spans = [replace(other, path="films/two.mp4", start_s=start, end_s=start + 5.0) for start in (0.0, 5.0)]
    writer = kit.writer()
    writer.add_clips([*(make.video(n) for n in range(6)), make.image(0), *spans])
    writer.add_samples("mix", [sample(1, GONE), sample(2, spans[0].clip_id), sample(3, "tiny/videos/0.mp4")])
    kit.fill()
    kit.fill(make.identity(encoder="vivit"))
    return kit, [span.clip_id for span in spans]


def test_the_same_video_under_other_ids_is_named_and_nothing_is_removed_without_a_word(twice):
    kit, others = twice
    with pytest.raises(UserError, match=r"nothing was removed: 2 other clips .*--all-copies .*--exact-ids") as refused:
        tombstone(kit.path, [GONE], reason="consent")
    assert all(clip_id in str(refused.value) for clip_id in others)
    assert not read_tombstones(kit.writer().objects)
    assert GONE in kit.open().clips["clip_id"].to_pylist()
    tombstone(kit.path, ["tiny/videos/0.mp4"], reason="consent")  # whose media no other clip has: no question


def test_everywhere_removes_every_clip_of_the_video_from_the_files_too(twice, make):
    kit, others = twice
    shards = lambda: [file for file in (kit.path / "video").rglob("c/**/*") if file.is_file()]  # noqa: E731
    before = kit.open()
    spec = kit.group(make.identity()).specs["tokens"]
    needles = [encode_row(spec, before.read([clip_id], encoder="dinov2")[0]) for clip_id in (GONE, *others)]
    assert all(any(needle in file.read_bytes() for file in shards()) for needle in needles)
    done = tombstone(kit.path, [GONE], reason="consent", all_copies=True)
    assert done["clips"] == sorted([GONE, *others])
    assert done["others of the same media"] == {"removed": sorted(others)}
    assert not any(needle in file.read_bytes() for file in shards() for needle in needles)
    after = kit.open()
    assert not {GONE, *others} & set(after.clips["clip_id"].to_pylist())
    assert [s.sample_id for s in after.samples("mix")] == ["3"]
    assert [stone.clips for stone in after.tombstones.values()] == [tuple(sorted([GONE, *others]))]
    assert verify_store(kit.path, "full") == []
    again = tombstone(kit.path, [GONE], reason="consent")  # finishing a removal asks nothing
    assert (again["already removed"], again["blocks rewritten"]) == (1, 0)


def test_only_these_leaves_the_others_and_says_which(twice):
    kit, others = twice
    done = tombstone(kit.path, [GONE], reason="licence", all_copies=False)
    assert (done["clips"], done["others of the same media"]) == ([GONE], {"left": sorted(others)})
    assert set(others) <= set(kit.open().clips["clip_id"].to_pylist())
    assert verify_store(kit.path, "full") == []


def test_a_clip_that_failed_on_the_same_media_is_found(kit, make):
    kit.media = lambda clip: "c" * 64
    kit.writer().add_clips([make.video(0), make.video(1)])
    rows = make.clips_by_row(kit.writer())["video"]
    block = kit.group(make.identity()).begin(0)
    block.add(0, make.floats(rows[0], make.identity()), media_sha256="c" * 64, decoder="frames/1")
    block.fail(1, "cut off", media_sha256="c" * 64)
    block.commit()
    assert clips_of_same_media(kit.writer(), ["tiny/videos/1.mp4"]) == ["tiny/videos/0.mp4"]
    assert clips_of_same_media(kit.writer(), ["tiny/videos/0.mp4"]) == ["tiny/videos/1.mp4"]
    assert clips_of_same_media(kit.writer(), ["tiny/videos/0.mp4", "tiny/videos/1.mp4"]) == []


def test_rows_and_reads_of_clips_after_a_removed_one_are_theirs(kit, make):
    clips = [make.video(n) for n in range(4)] + [make.image(0)]
    kit.writer().add_clips(clips)
    kit.fill()
    tombstone(kit.path, [clips[0].clip_id], reason="licence", all_copies=False)
    store = kit.open()
    assert store.rows([clip.clip_id for clip in clips[1:4]], encoder="dinov2").tolist() == [1, 2, 3]
    assert store.rows([clips[4].clip_id], encoder="dinov2").tolist() == [0]  # in the array of stills
    with pytest.raises(UserError, match="several"):
        store.rows([clips[3].clip_id, clips[4].clip_id], encoder="dinov2")
