"""Damage is found: any flipped bit, any missing or foreign file."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from featurestore.clips import Sample, Turn
from featurestore.maintenance.findings import is_damaged
from featurestore.maintenance.verify import verify_store
from mervcache.errors import StoreNotFoundError, UserError

pytestmark = pytest.mark.slow

TURNS = (Turn(role="human", text="what?"), Turn(role="gpt", text="that"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, make):
    """A store with both kinds, every array, failures, a retry, samples, journals and two snapshots."""
    kit = make.kit(tmp_path_factory.mktemp("sound") / "store.zarr")
    writer = kit.writer()
    writer.add_clips([*(make.video(n) for n in range(6)), *(make.image(n) for n in range(2))])
    writer.add_samples("mix", [Sample(sample_id="1", clip_id=None, turns=TURNS, stage="align", source="x")])
    kit.fill(broken=("videos/1.mp4",))
    writer.add_clips([make.video(1)], retry=True)
    writer.add_samples("mix", [Sample(sample_id="2", clip_id=None, turns=TURNS, stage="align", source="x")])
    kit.fill(make.identity(encoder="vivit", storage_dtype="uint8", prefix_tokens=2))
    kit.fill()
    kit.add_reference_clips()
    writer.journal("run-1-driver", {"host": "h", "seconds": 1.5})
    return kit


@pytest.fixture
def store(sound, tmp_path):
    shutil.copytree(sound.path, tmp_path / "copy.zarr")
    return tmp_path / "copy.zarr"


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file() and "tmp" not in file.parts[-3:])


def test_a_sound_store_has_no_findings(sound):
    assert verify_store(sound.path) == []
    assert verify_store(sound.path, "full") == []


def levels_of(store) -> list[list]:
    """Files in sets that may be damaged together: none of a set is what another one is checked by."""
    files = files_of(store)
    levels: dict[str, list] = {}
    for file in files:
        key = file.relative_to(store).as_posix()
        name = {4: "arrays", 3: "groups"}.get(key.count("/") + 1, key) if file.name == "zarr.json" else None
        name = name or (key if key.startswith("snapshots/") else key.split("/")[0])
        levels.setdefault(name, []).append(file)
    return list(levels.values())


def test_every_one_of_hundreds_of_random_flipped_bits_is_found_and_named(store):
    rng, flips = random.Random(0), 0
    for files in levels_of(store) * 6:
        originals = {file: file.read_bytes() for file in files}
        for file, data in originals.items():
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
        named = {finding.key for finding in verify_store(store, "full")}
        assert {file.relative_to(store).as_posix() for file in files} <= named
        for file, data in originals.items():
            file.write_bytes(data)
        flips += len(files)
    assert flips > 300


def test_every_missing_file_is_found_and_named(store):
    for file in files_of(store):
        key, data = file.relative_to(store).as_posix(), file.read_bytes()
        if key == "zarr.json" or key.startswith("journal/") or key == newest_snapshot(store):
            continue  # no store without the first; nothing names the others
        file.unlink()
        assert verify_store(store), f"{key} is missing and was not noticed"
        file.write_bytes(data)


def newest_snapshot(store) -> str:
    return f"snapshots/{max(file.name for file in (store / 'snapshots').glob('*.json'))}"


def test_quick_finds_what_is_cut_short_without_reading_it(store):
    shard = next((store / "video").rglob("tokens/c/0/0/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (finding,) = verify_store(store)
    assert finding.key == shard.relative_to(store).as_posix()
    assert "its receipt names" in finding.problem


def test_a_flipped_bit_in_a_shard_is_full_work(store):
    shard = next((store / "video").rglob("tokens/c/0/0/0/0/0"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    assert verify_store(store) == []
    assert [finding.problem for finding in verify_store(store, "full")] == ["does not match its receipt's sha256"]


@pytest.mark.parametrize(
    "key",
    [
        "notes.txt",
        "clips/part-00000.parquet.partial",
        "samples/x.tmp",
        "journal/a b",
        "video/readme",
        "receipts/x.json",
    ],
)
def test_orphans_are_found(store, key):
    (store / key).write_text("x")
    assert [(finding.key, finding.problem, finding.severity) for finding in verify_store(store)] == [
        (key, "is no file of a feature store", "orphan")
    ]


def test_a_shard_without_a_receipt_is_work_in_progress(store):
    group = next((store / "video").glob("vivit-*"))
    shutil.copy(group / "tokens/c/0/0/0/0/0", group / "tokens/c/1/0/0/0/new")
    (group / "tokens/c/9/0/0/0").mkdir(parents=True)
    shutil.copy(group / "tokens/c/0/0/0/0/0", group / "tokens/c/9/0/0/0/0")
    found = {finding.key.split("/")[-1]: finding for finding in verify_store(store, "full")}
    assert {name: finding.severity for name, finding in found.items()} == {"new": "orphan", "0": "orphan"}
    assert "without a receipt" in found["0"].problem
    assert "run the same extract again" in found["0"].advice


def test_files_of_a_killed_run_are_found_and_swept_by_the_next(store, sound):
    program = (
        "import os, signal, sys; from featurestore.objects.local import LocalObjects;"
        "os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "LocalObjects(sys.argv[1]).put_exclusive('x', b'half')"
    )
    subprocess.run([sys.executable, "-c", program, str(store)], check=False)
    (finding,) = verify_store(store)
    assert "was left by an interrupted run" in finding.problem
    assert (finding.severity, finding.advice) == ("orphan", "the next extract removes it; or delete it")
    type(sound)(store).writer()
    assert verify_store(store) == []


def test_rows_given_out_after_the_last_snapshot_are_not_damage(store, make, sound):
    type(sound)(store).writer().add_clips([make.video(20)])
    findings = verify_store(store, "full")
    assert not is_damaged(findings)
    assert {finding.problem for finding in findings} == {"has 12 rows, the clip parts allocate 16"}  # of each array


def test_a_flipped_bit_in_what_no_snapshot_names_yet_is_found_by_the_files_own_digest(store, make, sound):
    writer = type(sound)(store).writer()
    writer.add_clips([make.video(20)])
    writer.add_samples("late", [Sample(sample_id="9", clip_id=None, turns=TURNS, stage="align", source="x")])
    rng = random.Random(0)
    for file in (store / "clips/part-00002.parquet", store / "samples/late.parquet"):
        data = file.read_bytes()
        for _ in range(60):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            assert is_damaged(verify_store(store, "full"))
        file.write_bytes(data)


def test_a_table_of_an_older_version_has_no_digest_and_is_covered_by_its_snapshot(store):
    file = store / "samples/mix.2.parquet"
    file.write_bytes(_without_digest(file))
    (finding,) = verify_store(store, "full")  # another file than the snapshot names
    assert finding.problem == "does not match its snapshot's"
    new = store / "samples/new.parquet"
    new.write_bytes(file.read_bytes())
    assert "no digest of its own, and no snapshot names it" in str(verify_store(store, "full"))


def _without_digest(file):
    sink = io.BytesIO()
    pq.write_table(pq.read_table(file), sink)
    return sink.getvalue()


def test_a_root_that_is_lost_is_a_finding(store):
    (store / "zarr.json").unlink()
    assert ("zarr.json", "is missing") in {(finding.key, finding.problem) for finding in verify_store(store)}


def test_a_link_is_damage_wherever_it_leads(store):
    shard = next((store / "video").rglob("tokens/c/0/0/0/0/0"))
    shard.rename(store / "elsewhere")
    shard.symlink_to(store / "elsewhere")
    found = {finding.key: finding.severity for finding in verify_store(store, "full")}
    assert found[shard.relative_to(store).as_posix()] == "damage"


@pytest.mark.parametrize("workers", [1, 4])
def test_blocks_are_checked_side_by_side_with_the_same_findings(store, workers, recorded):
    for shard in (store / "video").rglob("tokens/c/*/0/0/0/0"):
        shard.write_bytes(shard.read_bytes()[:-1])
    found = verify_store(store, "full", workers=workers, progress=recorded)
    shards = [finding for finding in found if "/tokens/c/" in finding.key]
    assert len(shards) == 12  # three blocks of two encoders: a size and a digest each
    assert recorded.totals == [8]
    assert len(recorded.items) == 8


def test_a_path_without_a_store_and_an_unknown_level_are_mistakes(tmp_path, sound):
    with pytest.raises(StoreNotFoundError, match="there is no feature store at"):
        verify_store(tmp_path)
    with pytest.raises(UserError, match="level must be one of quick, full"):
        verify_store(sound.path, "deep")
