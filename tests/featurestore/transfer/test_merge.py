"""Union and subset copy cells unchanged; export and import bring them back; untrusted files are checked."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from featurestore.clips import Clip, Sample, Turn
from featurestore.maintenance.verify import verify_store
from featurestore.store import FeatureStore
from featurestore.transfer.export import FORMATS, ExportCells, export
from featurestore.transfer.merge import StoreCells, combine
from featurestore.transfer.selection import Selection
from mervcache.errors import StoreDamagedError, StoreFormatError, UserError

pytestmark = pytest.mark.slow


def sample(number: int, clip: Clip | None, text: str = "What?") -> Sample:
    turns = (Turn(role="human", text=text), Turn(role="gpt", text="That."))
    return Sample(sample_id=f"s{number}", clip_id=clip and clip.clip_id, turns=turns, stage="finetune", source="tests")


@pytest.fixture
def stores(tmp_path, make):
    """Three labs' stores: overlapping clips, different encoders, failures, stills and prefix tokens."""
    siglip = make.identity(encoder="siglip", storage_dtype="uint8")
    vivit = make.identity(encoder="vivit", storage_dtype="bfloat16", prefix_tokens=2)

    class Stores:
        a, b, c = (make.kit(tmp_path / f"{name}.zarr") for name in "abc")

    Stores.a.writer().add_clips([make.video(n) for n in range(6)] + [make.image(n) for n in range(2)])
    Stores.a.writer().add_samples(
        "mix", [sample(0, make.video(4)), sample(1, None), sample(2, make.image(1)), sample(3, make.video(0))]
    )
    Stores.a.fill(broken=("videos/2.mp4",))
    Stores.a.fill(siglip)
    Stores.a.writer().journal("run-a", {"host": "a"})
    Stores.b.writer().add_clips([make.video(n) for n in range(4, 10)])
    Stores.b.writer().add_samples("mix", [sample(0, make.video(4), "Other?"), sample(7, make.video(7))])
    Stores.b.fill(noise=1)
    Stores.b.fill(vivit)
    Stores.b.writer().journal("run-a", {"host": "b"})
    Stores.c.block_rows = {"video": 3, "image": 3}
    Stores.c.writer().add_clips([make.video(2)])
    Stores.c.fill(codec="none")
    return Stores


def cells(*kits):
    return [StoreCells(kit.path) for kit in kits]


def flags(store: FeatureStore, encoder: str) -> set[str]:
    return {clip["clip_id"] for clip in store.clips.to_pylist() if clip[encoder]}


def test_a_union_holds_every_cell_once_and_the_first_store_wins(stores, tmp_path, make):
    done = combine(cells(stores.a, stores.b), tmp_path / "union.zarr")
    union, a, b = FeatureStore.open(tmp_path / "union.zarr"), stores.a.open(), stores.b.open()
    assert verify_store(tmp_path / "union.zarr", "full") == []
    assert (done.clips, done.shared, done.differing) == (12, 2, 2)
    assert flags(union, "dinov2") == flags(a, "dinov2") | flags(b, "dinov2")
    assert flags(union, "vivit") == flags(b, "vivit")
    for encoder, source in (("dinov2", a), ("siglip", a), ("vivit", b)):
        ids = sorted(flags(source, encoder))
        assert np.array_equal(union.read(ids, encoder=encoder), source.read(ids, encoder=encoder))
        assert union.data_digest(ids, [encoder]) == source.data_digest(ids, [encoder])
    only_b = sorted(flags(b, "dinov2") - flags(a, "dinov2"))
    assert np.array_equal(union.read(only_b, encoder="dinov2"), b.read(only_b, encoder="dinov2"))
    assert np.array_equal(union.read_prefix(only_b, encoder="vivit"), b.read_prefix(only_b, encoder="vivit"))


def test_a_union_brings_reasons_conversations_and_journals_along(stores, tmp_path, make):
    combine(cells(stores.a, stores.b), tmp_path / "union.zarr")
    union = FeatureStore.open(tmp_path / "union.zarr")
    ((row),) = union.quarantine.to_pylist()
    assert (row["clip_id"], row["encoder"], row["reason"]) == (make.video(2).clip_id, "dinov2", "the file is cut off")
    wanted = {s.sample_id: s.turns[0].text for s in union.samples("mix")}
    assert wanted == dict.fromkeys(("s0", "s1", "s2", "s3", "s7"), "What?")
    hosts = sorted(record["host"] for _, record in union.journal() if "host" in record)
    assert hosts == ["a", "b"]
    (record,) = [entry for name, entry in union.journal() if name.startswith("combine-")]
    assert [entry["store"] for entry in record["combined from"]] == [str(stores.a.path), str(stores.b.path)]


def test_what_failed_in_one_store_is_taken_from_another(stores, tmp_path, make):
    combine(cells(stores.a, stores.c), tmp_path / "union.zarr")
    union = FeatureStore.open(tmp_path / "union.zarr")
    assert verify_store(tmp_path / "union.zarr", "full") == []
    assert union.quarantine.num_rows == 0
    wanted = [make.video(2).clip_id]
    assert np.array_equal(union.read(wanted, encoder="dinov2"), stores.c.open().read(wanted, encoder="dinov2"))


def test_clips_that_an_encoder_never_saw_stay_work_to_do(stores, tmp_path, make):
    combine(cells(stores.a, stores.b), tmp_path / "union.zarr")
    union = make.kit(tmp_path / "union.zarr")
    before = union.open()
    seen = flags(before, "siglip")
    union.fill(make.identity(encoder="siglip", storage_dtype="uint8"))
    after = union.open()
    assert flags(after, "siglip") == set(after.clips["clip_id"].to_pylist()) > seen
    ids = sorted(seen)
    assert np.array_equal(after.read(ids, encoder="siglip"), before.read(ids, encoder="siglip"))


def test_a_subset_cuts_clips_encoders_and_kinds(stores, tmp_path, make):
    wanted = frozenset(make.video(n).clip_id for n in (0, 5))
    combine(cells(stores.a), tmp_path / "few.zarr", selection=Selection(clips=wanted, encoders=("siglip",)))
    few = FeatureStore.open(tmp_path / "few.zarr")
    assert verify_store(tmp_path / "few.zarr", "full") == []
    assert (set(few.clips["clip_id"].to_pylist()), list(few.encoders)) == (wanted, ["siglip"])
    ids = sorted(wanted)
    assert np.array_equal(few.read(ids, encoder="siglip"), stores.a.open().read(ids, encoder="siglip"))
    assert [s.sample_id for s in few.samples("mix")] == ["s3"]
    combine(cells(stores.a), tmp_path / "stills.zarr", selection=Selection(kind="image"))
    assert FeatureStore.open(tmp_path / "stills.zarr").info()["clips"] == {"video": 0, "image": 2}


def test_the_same_union_has_the_same_bytes_and_a_second_run_adds_nothing(stores, tmp_path):
    def files(folder):
        found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return {path: data for path, data in found.items() if path.parts[0] != "tmp"}

    done = [combine(cells(stores.a, stores.b), tmp_path / name) for name in ("one", "two")]
    before = files(tmp_path / "one")
    assert before == files(tmp_path / "two")
    again = combine(cells(stores.a, stores.b), tmp_path / "one")
    assert (again.copied, again.snapshot) == (0, done[0].snapshot)
    assert files(tmp_path / "one") == before


def test_killed_at_any_put_a_union_goes_on_to_the_same_store(stores, tmp_path):
    program = """
import os, signal, sys
from featurestore.objects.local import LocalObjects
from featurestore.transfer.merge import StoreCells
from featurestore.transfer.merge import combine
left, put = int(sys.argv[4]), LocalObjects.put_exclusive
def put_exclusive(self, key, data):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, data)
LocalObjects.put_exclusive = put_exclusive
combine([StoreCells(sys.argv[1]), StoreCells(sys.argv[2])], sys.argv[3])
"""
    out, kills = tmp_path / "killed.zarr", 0
    while kills < 20:
        command = [sys.executable, "-c", program, stores.a.path, stores.b.path, out, str(6 + 2 * kills)]
        code = subprocess.run(command, check=False).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    combine(cells(stores.a, stores.b), tmp_path / "whole.zarr")
    killed, whole = FeatureStore.open(out), FeatureStore.open(tmp_path / "whole.zarr")
    assert killed.snapshot.split("-")[1] == whole.snapshot.split("-")[1]
    assert verify_store(out, "full") == []


def test_damage_in_a_source_is_found_before_it_is_copied(stores, tmp_path):
    shard = next(p for p in sorted((stores.a.path / "video").rglob("tokens/c/0/0/0/0/0")))
    data = bytearray(shard.read_bytes())
    data[20] ^= 4
    os.chmod(shard, 0o644)
    shard.write_bytes(data)
    with pytest.raises(StoreDamagedError):
        combine(cells(stores.a), tmp_path / "out.zarr")


def test_a_store_of_other_clips_is_no_place_for_a_union(stores, tmp_path):
    with pytest.raises(UserError, match="not selected here"):
        combine(cells(stores.a), stores.b.path, selection=Selection(kind="video"))


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_comes_back_with_the_same_rows_and_digests(stores, tmp_path, format):
    for kit in (stores.a, stores.b):
        folder, back = tmp_path / f"{kit.path.stem}-{format}", tmp_path / f"{kit.path.stem}-{format}.zarr"
        export(StoreCells(kit.path), folder, format=format)
        check = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=False)
        assert check.returncode == 0
        combine([ExportCells(folder)], back)
        assert verify_store(back, "full") == []
        before, after = kit.open(), FeatureStore.open(back)
        for encoder in before.encoders:
            ids = sorted(flags(before, encoder))
            assert flags(after, encoder) == set(ids)
            assert before.data_digest(ids, [encoder]) == after.data_digest(ids, [encoder])
        assert after.quarantine.to_pylist() == before.quarantine.to_pylist()
        assert after.samples() == before.samples()


def test_webdataset_reads_an_export(stores, tmp_path, make):
    import webdataset

    export(StoreCells(stores.a.path), tmp_path / "tars", format="webdataset", selection=Selection(encoders=("dinov2",)))
    (first, *_) = sorted((tmp_path / "tars/data/video").rglob("*.tar"))
    records = list(webdataset.WebDataset(str(first), shardshuffle=False).decode())
    assert records[0]["json"]["clip_id"] == make.video(0).clip_id
    expected = stores.a.open().read([make.video(0).clip_id], encoder="dinov2")[0]
    assert np.array_equal(records[0]["tokens.npy"], expected)


def spoil(folder, path, data: bytes, *, sums: bool) -> None:
    """Put other bytes into an export, and their digest into its list if `sums`."""
    import hashlib

    (folder / path).write_bytes(data)
    if sums:
        lines = (folder / "SHA256SUMS").read_text().splitlines()
        lines = [
            f"{hashlib.sha256(data).hexdigest()}  {path}" if line.endswith(f"  {path}") else line for line in lines
        ]
        (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


@pytest.fixture
def tars(stores, tmp_path):
    export(StoreCells(stores.a.path), tmp_path / "tars", format="webdataset", selection=Selection(encoders=("dinov2",)))
    return tmp_path / "tars"


def the_tar(folder) -> str:
    return sorted(folder.rglob("data/video/*/00000000.tar"))[0].relative_to(folder).as_posix()


def test_a_file_that_differs_from_its_checksum_is_refused(tars, tmp_path):
    data = bytearray((tars / the_tar(tars)).read_bytes())
    data[1000] ^= 1
    spoil(tars, the_tar(tars), bytes(data), sums=False)
    with pytest.raises(StoreDamagedError, match="differs from its digest"):
        combine([ExportCells(tars)], tmp_path / "out.zarr")


def tar_of(name: str, data: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, **options)
    return sink.getvalue()


HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<f2', 'fortran_order': False, 'shape': (99999999999, 2, 2, 8), }".ljust(117)
    + b"\n"
)
CRAFTED = {
    "no tar": b"not a tar at all" * 100,
    "empty": tar_of("000000000.other.npy", b""),
    "climbing": tar_of("../../000000000.tokens.npy", npy(np.zeros((4, 2, 2, 8), np.float16))),
    "pickle": tar_of("000000000.tokens.npy", npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)),
    "other shape": tar_of("000000000.tokens.npy", npy(np.zeros((4, 2, 2, 9), np.float16))),
    "huge": tar_of("000000000.tokens.npy", HUGE),
    "other tokens": tar_of("000000000.tokens.npy", npy(np.zeros((4, 2, 2, 8), np.float16))),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_tars_with_right_checksums_are_refused(tars, tmp_path, name):
    spoil(tars, the_tar(tars), CRAFTED[name], sums=True)
    with pytest.raises((StoreFormatError, StoreDamagedError)):
        combine([ExportCells(tars)], tmp_path / "out.zarr")


@pytest.mark.parametrize(
    "line", ["0" * 64 + "  ../../etc/passwd", "0" * 64 + "  /etc/passwd", "not a checksum", "0" * 63 + "  data/x"]
)
def test_checksums_of_names_outside_the_folder_are_refused(tars, line):
    with (tars / "SHA256SUMS").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreFormatError, match="SHA256SUMS"):
        ExportCells(tars)


def test_a_link_in_an_export_is_not_followed(tars, tmp_path):
    path = tars / the_tar(tars)
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreFormatError, match="link"):
        combine([ExportCells(tars)], tmp_path / "out.zarr")


def test_a_folder_that_is_no_export_or_not_empty_is_told(tmp_path, stores):
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="no exported store"):
        ExportCells(tmp_path / "plain")
    (tmp_path / "plain" / "file").write_text("")
    with pytest.raises(UserError, match="not empty"):
        export(StoreCells(stores.a.path), tmp_path / "plain", format="safetensors")
