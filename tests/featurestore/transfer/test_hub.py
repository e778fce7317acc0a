"""A store goes to the Hub in commits, the snapshot in the last; what stops a push loses nothing and shows nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import HfApi, constants

from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.objects import hub as hub_objects
from featurestore.objects.hub import HubObjects
from featurestore.objects.open import open_objects
from featurestore.store import FeatureStore
from featurestore.tags import tag_snapshot
from featurestore.transfer.selection import Selection
from featurestore.transfer.sync import push, transfer
from mervcache.errors import RunStoppedError, StoreDamagedError, UserError

pytestmark = pytest.mark.slow

URL = "hf://datasets/lab/feats"


@pytest.fixture
def full(kit, make):
    """Two encoders, one with shards that the Hub keeps as large files and one without; a clip failed."""
    kit.writer().add_clips([make.video(n) for n in range(6)])
    kit.fill(broken=("videos/3.mp4",))
    kit.fill(make.identity(encoder="siglip", storage_dtype="uint8"))
    kit.writer().journal("run-1", {"host": "here"})
    return kit


def stored(kit) -> dict[str, bytes]:
    """What must arrive: every file of the store but the journals, of the snapshots the newest."""
    files = {str(path.relative_to(kit.path)): path for path in kit.path.rglob("*") if path.is_file()}
    newest = f"snapshots/{kit.open().snapshot}."
    return {
        key: path.read_bytes()
        for key, path in files.items()
        if not key.startswith(("tmp/", "journal/")) and (not key.startswith("snapshots/") or key.startswith(newest))
    }


def arrived(hub, folder: str = "") -> dict[str, bytes]:
    own = ("README.md", "listing.json", ".gitattributes")
    files = {key.removeprefix(folder): data for key, data in hub.files.items()}
    return {key: data for key, data in files.items() if key not in own and not key.startswith("viewer/")}


def test_a_store_on_the_hub_has_the_same_bytes_reads_the_same_and_comes_back(full, hub, tmp_path):
    done = push(full.path, URL, license="cc-by-4.0")
    assert (done.sent_blocks, done.sent_bytes, done.snapshot) == (done.blocks, done.bytes, full.open().snapshot)
    assert arrived(hub) == stored(full)
    here, there = full.open(), FeatureStore.open(URL, cache=False)
    ids = [clip for clip in here.clips["clip_id"].to_pylist() if "/3.mp4" not in clip]
    for encoder in here.encoders:
        assert np.array_equal(here.read(ids, encoder=encoder), there.read(ids, encoder=encoder))
    assert here.data_digest(ids, ["dinov2"]) == there.data_digest(ids, ["dinov2"])
    transfer(URL, tmp_path / "back.zarr", check=True)
    assert verify_store(tmp_path / "back.zarr", "full") == []
    assert FeatureStore.open(tmp_path / "back.zarr").data_digest(ids, ["siglip"]) == here.data_digest(ids, ["siglip"])


def test_the_last_commit_has_the_snapshot_the_card_and_the_listing_and_earlier_ones_are_bounded(full, hub, monkeypatch):
    monkeypatch.setattr(hub_objects, "MAX_FILES", 6)
    push(full.path, URL)
    assert all(len(paths) <= 6 for paths in hub.commits)
    newest = full.open().snapshot
    assert set(hub.commits[-1]) == {
        f"snapshots/{newest}.json",
        f"snapshots/{newest}.parquet",
        "viewer/clips.parquet",
        "viewer/quarantine.parquet",
        "README.md",
        "listing.json",
    }
    order = [key for paths in hub.commits for key in paths]
    for receipt in (key for key in order if key.startswith("receipts/")):
        _, kind, group, block = receipt.split("/")
        shards = [key for key in order if key.startswith(f"{kind}/{group}/") and f"/c/{int(block[:8])}/" in key]
        assert shards
        assert all(order.index(shard) < order.index(receipt) for shard in shards)


def test_pushing_again_makes_no_commit_and_what_is_new_goes_alone(full, hub, make):
    push(full.path, URL)
    commits, uploads = len(hub.commits), len(hub.uploads)
    again = push(full.path, URL)
    assert (again.sent_bytes, len(hub.commits), len(hub.uploads)) == (0, commits, uploads)
    full.writer().add_clips([make.video(20)])
    full.fill()
    assert push(full.path, URL).sent_blocks == 1
    assert FeatureStore.open(URL, cache=False).snapshot == full.open().snapshot
    assert not set(hub.uploads[:uploads]) & set(hub.uploads[uploads:])


PROGRAM = """
import sys
from featurestore.objects import hub as hub_objects
from featurestore.transfer.sync import push
hub_objects.MAX_FILES = 6
push(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("applies", [False, True], ids=["before it counts", "after, its answer lost"])
def test_killed_within_a_commit_a_push_shows_nothing_and_completes_when_run_again(full, hub, applies):
    hub.hold_at, hub.applies_held = 2, applies
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, full.path, URL])
    assert hub.held.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    hub.released.set()
    assert len(hub.commits) == 2 + applies
    with pytest.raises(UserError, match=r"has no listing\.json"):
        FeatureStore.open(URL, cache=False)
    before = list(hub.uploads)
    push(full.path, URL)
    assert arrived(hub) == stored(full)
    assert before
    assert not set(before) & set(hub.uploads[len(before) :])  # also what was uploaded and is in no commit


def test_some_encoders_go_alone_and_into_a_folder(full, hub):
    push(full.path, f"{URL}/stores/one", selection=Selection(encoders=("siglip",)))
    part = FeatureStore.open(f"{URL}/stores/one", cache=False)
    assert list(part.encoders) == ["siglip"]
    assert {key.split("/")[0] for key in hub.files} == {".gitattributes", "stores"}
    push(full.path, f"{URL}/stores/one")
    assert list(FeatureStore.open(f"{URL}/stores/one", cache=False).encoders) == ["dinov2", "siglip"]


def test_whoever_commits_meanwhile_is_not_overwritten(full, hub, monkeypatch):
    monkeypatch.setattr(hub_objects, "MAX_FILES", 5)
    look = HfApi.list_repo_tree

    def overtaken(self, *where, **options):
        found = list(look(self, *where, **options))
        with hub.lock:
            hub.commit({"README.md": b"# Mine"}, set())
        return found

    monkeypatch.setattr(HfApi, "list_repo_tree", overtaken)
    with pytest.raises(RunStoppedError, match=r"another client committed to .* run the same command again"):
        push(full.path, URL)
    assert hub.commits == []
    monkeypatch.setattr(HfApi, "list_repo_tree", look)
    assert push(full.path, URL).card is False
    assert hub.files["README.md"] == b"# Mine"
    assert arrived(hub) == stored(full)


def test_other_bytes_of_the_same_size_are_told_by_the_hubs_own_sha256_and_what_changed_there_by_check(full, hub):
    push(full.path, URL, check=True)
    key = next(key for key in hub.lfs_paths[hub.heads["main"]] if "/c/" in key)
    with hub.lock:
        hub.commit({key: bytes(len(hub.files[key]))}, {key})
    with pytest.raises(UserError, match="the destination holds other bytes"):
        push(full.path, URL)
    small = next(key for key in stored(full) if "/c/" in key and key not in hub.lfs_paths[hub.heads["main"]])
    with hub.lock:
        hub.commit({key: stored(full)[key], small: bytes(len(hub.files[small]))}, {key})
    with pytest.raises(StoreDamagedError, match="arrived with other bytes"):
        push(full.path, URL, check=True)


def test_what_was_taken_back_is_taken_back_there(full, hub, make):
    push(full.path, URL)
    tombstone(full.path, [make.video(1).clip_id], reason="licence")
    push(full.path, URL)
    assert arrived(hub).items() >= stored(full).items()
    assert make.video(1).clip_id not in FeatureStore.open(URL, cache=False).clips["clip_id"].to_pylist()


def test_without_a_token_nothing_is_asked(full, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(UserError, match=r"no token to write to .*HF_TOKEN.*hf auth login"):
        push(full.path, URL)


@pytest.mark.parametrize(
    ("url", "token", "error", "message"),
    [
        ("hf://datasets/lab/nothing", "secret", UserError, r"hf repos create lab/nothing --repo-type dataset"),
        (f"{URL}@draft", "secret", UserError, r"no branch 'draft'.*hf repos branch create"),
        (URL, "may-only-read", RunStoppedError, r"refused these credentials.*HF_TOKEN"),
        ("hf://datasets/lab/a b", "secret", UserError, r"names no repository"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_next_step(full, hub, monkeypatch, url, token, error, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error, match=message):
        push(full.path, url)
    assert hub.commits == []


def test_a_gitignore_by_which_the_hub_would_leave_files_out_is_refused(full, hub):
    with hub.lock:
        hub.commit({".gitignore": b"*.json"}, set())
    with pytest.raises(UserError, match=r"has a \.gitignore"):
        push(full.path, URL)


def test_a_place_at_the_hub_swaps_deletes_and_reads_what_waits(hub):
    objects = HubObjects(URL)
    objects.put_exclusive("a/one", b"1")
    assert (objects.get("a/one"), objects.size("a/one"), objects.list_names("")) == (b"1", 1, [".gitattributes", "a"])
    assert objects.compare_and_swap("a/one", b"2", b"3") is False
    assert objects.compare_and_swap("a/one", b"1", b"22") is True
    buffer = bytearray(1)
    assert objects.open("a/one").read_into(1, [memoryview(buffer)]) == 1  # by ranges: committed first
    assert (bytes(buffer), hub.commits) == (b"2", [["a/one"]])
    objects.delete("a/one")
    assert not objects.exists("a/one")
    with pytest.raises(FileNotFoundError):
        objects.get("a/one")
    objects.flush()
    assert list(hub.files) == [".gitattributes"]


def test_the_hub_is_not_written_in_place(tmp_path, hub):
    for write in (lambda objects: objects.put_exclusive("b", b""), lambda objects: objects.delete("b")):
        with pytest.raises(UserError, match=r"not written in place.*merv-pipeline push STORE hf://datasets/lab/feats"):
            write(open_objects(URL))
    with pytest.raises(UserError, match="not written in place"):
        transfer(tmp_path / "no store here", URL)


def test_a_tag_of_the_newest_snapshot_is_a_tag_of_the_repository(full, hub, make, caplog):
    first = tag_snapshot(full.path, "v1").snapshot
    push(full.path, URL)
    commit = hub.tags["v1"]
    assert commit == hub.heads["main"]
    full.writer().add_clips([make.video(20)])
    full.fill()
    push(full.path, URL)  # v1 is older now and stays where it was
    assert hub.tags == {"v1": commit} != hub.heads
    for place, snapshot in ((f"{URL}@v1", None), (URL, "v1")):
        assert FeatureStore.open(place, snapshot=snapshot, cache=False).snapshot == first
    tag_snapshot(full.path, "v1", force=True)
    push(full.path, URL)
    assert hub.tags == {"v1": hub.heads["main"]}
    with hub.lock:
        hub.tags["mine"] = commit
    tag_snapshot(full.path, "mine")
    push(full.path, URL)
    assert hub.tags["mine"] == commit
    assert "has a tag mine already" in caplog.text


def test_a_store_in_a_folder_tags_no_repository(full, hub):
    tag_snapshot(full.path, "v1")
    push(full.path, f"{URL}/stores/one")
    assert hub.tags == {}
    assert FeatureStore.open(f"{URL}/stores/one", snapshot="v1", cache=False).tags == full.open().tags
