"""A store is copied byte for byte, may be stopped anywhere, and gets a card that describes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from featurestore.maintenance.repair import repair_store
from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.objects.open import open_objects
from featurestore.snapshots import newest_snapshot_id
from featurestore.store import FeatureStore
from featurestore.transfer.dataset_card import card
from featurestore.transfer.selection import Selection, read_clip_list
from featurestore.transfer.sync import push, transfer
from mervcache.errors import StoreDamagedError, StoreError, StoreFormatError, StoreNotFoundError, UserError
from tests.featurestore.sound_store import sample

pytestmark = pytest.mark.slow


@pytest.fixture
def full(kit, make):
    """A store of two encoders, ten videos in three blocks and a still; one clip failed."""
    kit.writer().add_clips([make.video(n) for n in range(10)] + [make.image(0)])
    kit.fill(broken=("videos/3.mp4",))
    kit.fill(make.identity(encoder="siglip", storage_dtype="uint8"))
    kit.writer().journal("run-1", {"host": "here"})
    return kit


def content(
    place, skipped=("README.md", "listing.json", "newest.json", "journal", "tmp", "viewer")
) -> dict[str, bytes]:
    """Every object but journals, of the snapshots the newest alone."""
    objects = open_objects(place)
    newest = f"snapshots/{newest_snapshot_id(objects)}."
    return {
        key: objects.get(key)
        for key in objects.list_tree()
        if key.split("/")[0] not in skipped and (not key.startswith("snapshots/") or key.startswith(newest))
    }


def test_a_store_pushed_and_pulled_has_the_same_bytes_and_reads_the_same(full, s3, tmp_path):
    pushed = push(full.path, s3, license="cc-by-4.0")
    assert (pushed.sent_blocks, pushed.sent_bytes) == (pushed.blocks, pushed.bytes)
    transfer(s3, tmp_path / "back.zarr", check=True)
    assert content(full.path) == content(s3) == content(tmp_path / "back.zarr")
    assert verify_store(tmp_path / "back.zarr", "full") == []
    here, there = full.open(), FeatureStore.open(s3, cache=False)
    ids = [clip for clip in here.clips["clip_id"].to_pylist() if "/3.mp4" not in clip]
    for encoder in here.encoders:
        assert np.array_equal(here.read(ids, encoder=encoder), there.read(ids, encoder=encoder))
    assert there.quarantine.equals(here.quarantine)
    assert here.data_digest(ids, ["dinov2"]) == there.data_digest(ids, ["dinov2"])


def test_a_receipt_larger_than_any_is_refused_by_its_size(full, tmp_path):
    receipt = next((full.path / "receipts/video").glob("dinov2-*/*.json"))
    receipt.write_bytes(receipt.read_bytes() + b" " * (1 << 20))
    with pytest.raises(StoreFormatError, match="more than the"):
        transfer(full.path, tmp_path / "there.zarr")


def test_pushing_again_sends_nothing_and_later_blocks_alone(full, s3, make):
    push(full.path, s3)
    again = push(full.path, s3)
    assert (again.sent_blocks, again.sent_bytes, again.snapshot) == (0, 0, full.open().snapshot)
    full.writer().add_clips([make.video(n) for n in range(20, 24)])
    full.fill()
    later = push(full.path, s3)
    assert later.sent_blocks == 1
    assert content(full.path) == content(s3)


def test_progress_counts_what_moves_and_not_what_is_there(full, make, tmp_path, recorded):
    def send(**options) -> tuple[int, int]:
        recorded.totals.clear()
        recorded.items.clear()
        transfer(full.path, tmp_path / "out.zarr", progress=recorded, **options)
        (total,) = recorded.totals
        return total, sum(recorded.items)

    whole = full.open().info()["stored_bytes"]
    assert send() == (whole, whole)
    full.writer().add_clips([make.video(20)])
    full.fill()
    late = full.open().info()["stored_bytes"] - whole
    assert send() == (late, late)
    assert send(check=True) == (whole + late,) * 2


def test_some_encoders_travel_alone_and_the_others_may_follow(full, s3, tmp_path):
    push(full.path, s3, selection=Selection(encoders=("siglip",)))
    part = FeatureStore.open(s3, cache=False)
    assert list(part.encoders) == ["siglip"]
    transfer(s3, tmp_path / "part.zarr")
    assert verify_store(tmp_path / "part.zarr", "full") == []
    assert push(full.path, s3).sent_blocks > 0
    assert list(FeatureStore.open(s3, cache=False).encoders) == ["dinov2", "siglip"]


def test_some_clips_travel_in_the_whole_blocks_that_hold_them(full, tmp_path, make):
    wanted = frozenset((make.video(0).clip_id, make.video(9).clip_id))
    done = transfer(full.path, tmp_path / "some.zarr", selection=Selection(clips=wanted))
    # Of dinov2: rows 0..3 without the broken one, and 8, 9; of siglip: 0..3 and 8, 9.
    assert done.overhead == pytest.approx((3 + 2 + 4 + 2) / 4)
    store = FeatureStore.open(tmp_path / "some.zarr")
    flags = dict(zip(store.clips["clip_id"].to_pylist(), store.clips["dinov2"].to_pylist(), strict=True))
    assert [n for n in range(10) if flags[make.video(n).clip_id]] == [0, 1, 2, 8, 9]
    assert store.read(sorted(wanted), encoder="dinov2").shape[0] == 2
    assert verify_store(tmp_path / "some.zarr", "full") == []


def test_names_that_are_nowhere_are_refused_before_anything_is_sent(full, tmp_path):
    for selection, message in (
        (Selection(encoders=("dinov3",)), "unknown encoder 'dinov3', the nearest known one is 'dinov2'"),
        (Selection(datasets=("tinny",)), "unknown dataset 'tinny'"),
        (Selection(clips=frozenset(("x/y.mp4",))), "1 of the 1 clips are not there"),
    ):
        with pytest.raises(UserError, match=message):
            transfer(full.path, tmp_path / "out.zarr", selection=selection)
    assert not (tmp_path / "out.zarr").exists()


def test_a_list_of_clips_is_one_id_a_line(tmp_path):
    (tmp_path / "clips.txt").write_text("a/1.mp4\n\n  a/2.mp4 \n")
    assert read_clip_list(tmp_path / "clips.txt") == {"a/1.mp4", "a/2.mp4"}
    (tmp_path / "clips.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_clip_list(tmp_path / "clips.txt")


def test_a_damaged_shard_is_not_sent(full, tmp_path):
    shard = next(path for path in (full.path / "video").rglob("c/1/*") if path.is_dir())
    shard = next(path for path in shard.rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreDamagedError, match="does not match its receipt's sha256: not sent"):
        transfer(full.path, tmp_path / "out.zarr")
    with pytest.raises(StoreError, match="no snapshot yet"):
        FeatureStore.open(tmp_path / "out.zarr")


def test_bytes_that_arrived_wrong_are_found_by_check(full, tmp_path):
    transfer(full.path, tmp_path / "out.zarr")
    shard = next(path for path in (tmp_path / "out.zarr/image").rglob("c/0/*/*/*/*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreDamagedError, match="arrived with other bytes"):
        transfer(full.path, tmp_path / "out.zarr", check=True)


def test_another_store_at_the_destination_is_left_alone(full, tmp_path, make):
    other = make.kit(tmp_path / "other.zarr")
    other.writer().add_clips([make.video(n, "elsewhere") for n in range(3)])
    other.fill()
    before = content(other.path)
    with pytest.raises(UserError, match=r"holds another store.*union"):
        transfer(full.path, other.path)
    assert content(other.path) == before
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a feature store"):
        transfer(full.path, tmp_path / "folder")


def test_another_extraction_of_the_same_clips_is_told_apart(full, tmp_path, make):
    twin = make.kit(tmp_path / "twin.zarr")
    twin.writer().add_clips([make.video(n) for n in range(10)] + [make.image(0)])
    twin.fill(noise=1)
    with pytest.raises(UserError, match=r"another extraction of the same clips.*union"):
        transfer(full.path, twin.path)


def test_a_source_without_store_or_snapshot_says_so(tmp_path, kit):
    with pytest.raises(StoreNotFoundError):
        transfer(tmp_path / "nowhere.zarr", tmp_path / "out.zarr")
    kit.writer()
    with pytest.raises(StoreError, match="has no snapshot yet"):
        transfer(kit.path, tmp_path / "out.zarr")


PROGRAM = """
import sys
from featurestore.objects.local import LocalObjects
from featurestore.transfer.sync import transfer
import featurestore.transfer.sync as t
stop = int(sys.argv[3])
count = 0
put = LocalObjects.put_exclusive
def put_exclusive(self, key, data):
    global count
    count += 1
    if count == stop:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, data)
LocalObjects.put_exclusive = put_exclusive
transfer(sys.argv[1], sys.argv[2], workers=1)
"""


def test_killed_before_any_put_a_pull_leaves_an_older_store_or_none_and_completes_when_run_again(full, tmp_path, make):
    out = tmp_path / "out.zarr"
    transfer(full.path, out, selection=Selection(encoders=("dinov2",)))
    older = FeatureStore.open(out).snapshot
    full.writer().add_clips([make.video(n) for n in range(30, 33)])
    newest = full.fill()
    stop, kills = 2, 0
    while subprocess.run([sys.executable, "-c", PROGRAM, full.path, out, str(stop)], check=False).returncode != 0:
        kills += 1
        seen = FeatureStore.open(out)
        assert seen.snapshot == older
        ids = [clip["clip_id"] for clip in seen.clips.to_pylist() if clip["dinov2"]]
        assert len(seen.read(ids, encoder="dinov2")) == len(ids) == 10
        stop = 2 + kills % 5  # each run gets a little further
        assert kills < 40
    assert kills > 4
    assert verify_store(out, "full") == []
    assert newest.split("-")[0] <= FeatureStore.open(out).snapshot.split("-")[0]


def test_killed_at_some_moment_a_push_to_a_bucket_completes_when_run_again(full, s3):
    program = f"from featurestore.transfer.sync import push; push({str(full.path)!r}, {s3!r})"
    process = subprocess.Popen([sys.executable, "-c", program])
    objects = open_objects(s3)
    deadline = time.monotonic() + 60
    while len(objects.list_tree()) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    push(full.path, s3)
    assert content(full.path) == content(s3)


def test_the_card_tells_licence_identities_counts_and_reasons_and_the_hub_can_read_it(full, s3):
    from huggingface_hub import DatasetCard

    push(full.path, s3, license="cc-by-4.0")
    objects = open_objects(s3)
    found = DatasetCard(objects.get("README.md").decode())
    assert found.data.license == "cc-by-4.0"
    identities = full.open().encoders
    for line in (
        f"| dinov2 | `{identities['dinov2'].id}` | random:0 | 4 x 2 x 2 | 8 | float16 | 10 | 1 |",
        "| tiny | 11 |",
        "| dinov2 | the file is cut off | 1 |",
        f"store = FeatureStore.open({s3!r})",
    ):
        assert line in found.text
    push(full.path, s3)
    assert "license: cc-by-4.0" in objects.get("README.md").decode()


def test_a_readme_of_somebody_elses_stays(full, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Mine")
    assert push(full.path, tmp_path / "out").card is False
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine"


def test_the_card_tells_removals_and_how_many_reasons_it_leaves_out(kit, make):
    kit.writer().add_clips([make.video(n) for n in range(25)])
    group = kit.group(make.identity())
    for block in group.missing_blocks():
        writer = group.begin(block)
        for row in sorted(writer.planned):
            writer.fail(row, f"the file has {row} tracks")
        writer.commit()
    kit.writer().publish_snapshot()
    tombstone(kit.path, [make.video(24).clip_id], reason="licence")
    text = card(kit.open(), place="x")
    assert text.count("tracks |") == 20
    assert "And 4 rarer reasons: `merv-pipeline quarantine list` lists all." in text
    assert "Removed on request, tokens and conversations: 1 clips;" in text


def test_a_license_is_an_identifier(full):
    with pytest.raises(UserError, match=r"identifier such as cc-by-4\.0"):
        card(full.open(), place="x", license="do what you want\nlicense: mit")


def test_the_listing_holds_every_object_but_itself(full, s3):
    push(full.path, s3)
    listed = json.loads(open_objects(s3).get("listing.json"))["objects"]
    assert listed == {key: len(data) for key, data in content(s3).items()}


def test_a_place_that_is_only_read_is_refused_before_anything_is_asked_or_read(tmp_path):
    with pytest.raises(UserError, match=r"can only be read here.*merv-pipeline push"):
        push(tmp_path / "no store here", "https://127.0.0.1:9/feats")


def test_a_pushed_folder_behind_a_web_server_and_on_the_hub_is_read_and_pulled(full, tmp_path, monkeypatch, web):
    push(full.path, web.folder / "datasets/lab/feats/resolve/main")
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    for url in (f"{web.url}/datasets/lab/feats/resolve/main", "hf://datasets/lab/feats"):
        store = FeatureStore.open(url, cache=tmp_path / "cache")
        ids = [clip["clip_id"] for clip in store.clips.to_pylist() if clip["dinov2"]]
        assert np.array_equal(store.read(ids, encoder="dinov2"), full.open().read(ids, encoder="dinov2"))
        transfer(url, tmp_path / url.split(":")[0])
        assert content(tmp_path / url.split(":")[0]) == content(full.path)
    assert web.tokens == {"Bearer secret"}


def test_a_copy_of_a_store_whose_samples_were_written_twice_is_sound(kit, make, tmp_path):
    """As after `extract --limit 1` and a full extraction: only the newest version is named by the newest snapshot."""
    clips = [make.video(n) for n in range(2)]
    for listed in (clips[:1], clips):
        kit.writer().add_clips(listed)
        kit.writer().add_samples("tiny-align", [sample(n, clip) for n, clip in enumerate(listed)])
        kit.fill()
    assert len(list((kit.path / "samples").iterdir())) == 2
    transfer(kit.path, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy/samples").iterdir()] == ["tiny-align.2.parquet"]
    assert verify_store(tmp_path / "copy", "full") == []
    assert repair_store(tmp_path / "copy", other=kit.path) == []
    assert FeatureStore.open(tmp_path / "copy").samples() == kit.open().samples()
    (kit.path / "samples/tiny-align.parquet").unlink()  # an older snapshot names it
    assert [finding.key for finding in verify_store(kit.path, "full")] == ["samples/tiny-align.parquet"]
