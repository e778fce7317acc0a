"""FeatureStore: what outside readers rely on, for every storage dtype and codec."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from featurestore import FeatureStore
from featurestore.clips import Sample, Turn
from mervcache.errors import (
    ClipUnavailableError,
    StoreDamagedError,
    StoreError,
    StoreFormatError,
    StoreNotFoundError,
    UserError,
)

BOUNDS = {"float16": 2e-3, "bfloat16": 1.6e-2, "uint8": 1.5e-2}  # of normal values within 4.5
VIDEOS = [f"tiny/videos/{n}.mp4" for n in range(6)]
IMAGES = [f"tiny/images/{n}.jpg" for n in range(4)]


@pytest.fixture(params=list(BOUNDS))
def storage_dtype(request):
    return request.param


@pytest.fixture
def filled(kit, make):
    """A store with 6 videos and 4 stills of one encoder."""

    def fill(broken=(), codec=None, **identity):
        kit.writer().add_clips([*(make.video(n) for n in range(6)), *(make.image(n) for n in range(4))])
        kit.fill(make.identity(**identity), broken=broken, codec=codec)
        return kit.open()

    return fill


def expected(make, store, clip_id):
    """The floats that went in, with the time steps of a still repeated."""
    number = int(clip_id.split("/")[-1].split(".")[0])
    clip = make.video(number) if "videos" in clip_id else make.image(number)
    tokens = make.floats(clip, store.encoders["dinov2"])["tokens"]
    return tokens[np.arange(4) % len(tokens)]


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_every_clip_reads_back_within_its_dtypes_bound(filled, make, storage_dtype, codec):
    store = filled(storage_dtype=storage_dtype, codec=codec)
    ids = [VIDEOS[5], IMAGES[3], VIDEOS[0], IMAGES[0], VIDEOS[0]]
    tokens_BTHWD = store.read(ids, encoder="dinov2")
    assert tokens_BTHWD.shape == (5, 4, 2, 2, 8)
    assert tokens_BTHWD.dtype == (np.float16 if storage_dtype == "float16" else np.float32)
    for clip_id, tokens_THWD in zip(ids, tokens_BTHWD, strict=True):
        assert np.abs(tokens_THWD - expected(make, store, clip_id)).max() <= BOUNDS[storage_dtype]


@pytest.mark.parametrize("frames", [slice(1, 3), slice(None, None, 2), [3, 0], np.array([2]), slice(0, 0)])
def test_frames_pick_time_steps_of_videos_and_stills_alike(filled, storage_dtype, frames):
    store = filled(storage_dtype=storage_dtype)
    ids = [VIDEOS[1], IMAGES[1]]
    whole = store.read(ids, encoder="dinov2")
    assert np.array_equal(store.read(ids, encoder="dinov2", frames=frames), whole[:, frames])


def test_a_batch_can_be_read_into_memory_that_is_there(filled, storage_dtype):
    store = filled(storage_dtype=storage_dtype)
    ids = [VIDEOS[4], IMAGES[1]]
    expected_BTHWD = store.read(ids, encoder="dinov2")
    wide = np.zeros((2, 4, 2, 2, 2, 8), dtype=expected_BTHWD.dtype)
    for out in (np.empty_like(expected_BTHWD), wide[:, :, :, :, 1]):  # the second is not contiguous
        assert store.read(ids, encoder="dinov2", out=out) is out
        assert np.array_equal(out, expected_BTHWD)
    with pytest.raises(UserError, match=r"out must be \(2, 4, 2, 2, 8\)"):
        store.read(ids, encoder="dinov2", out=np.empty((1, 4, 2, 2, 8), dtype=expected_BTHWD.dtype))


@pytest.mark.parametrize("frames", [[4], 4])
def test_frames_outside_the_grid_are_an_error(filled, frames):
    with pytest.raises(UserError, match=r"frames must be 0\.\.3, got \[4\]"):
        filled().read(VIDEOS[:1], encoder="dinov2", frames=frames)


def test_prefix_tokens_are_read_beside(filled, make, storage_dtype):
    store = filled(storage_dtype=storage_dtype, prefix_tokens=3)
    prefix_BTKD = store.read_prefix([VIDEOS[2], IMAGES[2]], encoder="dinov2")
    assert prefix_BTKD.shape == (2, 4, 3, 8)
    exact = make.floats(make.video(2), store.encoders["dinov2"])["prefix"]
    assert np.abs(prefix_BTKD[0] - exact).max() <= BOUNDS[storage_dtype]
    assert np.array_equal(prefix_BTKD[1, 2:], prefix_BTKD[1, :2])


def test_a_store_without_prefix_tokens_says_so(filled):
    with pytest.raises(UserError, match="stored without prefix tokens"):
        filled().read_prefix(VIDEOS[:1], encoder="dinov2")


def test_no_clips_give_an_empty_batch(filled):
    assert filled().read([], encoder="dinov2").shape == (0, 4, 2, 2, 8)


def test_clips_tell_what_is_committed(filled, make):
    table = filled(broken=("videos/2.mp4",)).clips
    names = ["clip_id", "dataset", "path", "start_s", "end_s", "end_frame", "kind", "dinov2"]
    assert table.column_names == names
    assert table["clip_id"].to_pylist() == VIDEOS + IMAGES
    assert table["dinov2"].to_pylist() == [True, True, False] + [True] * 7
    assert table["kind"].to_pylist() == ["video"] * 6 + ["image"] * 4


def test_what_cannot_be_read_is_named(filled):
    store = filled(broken=("videos/2.mp4",))
    with pytest.raises(ClipUnavailableError, match=r"1 of 2 clips have no committed tokens of dinov2.*'tiny/videos/2"):
        store.read(VIDEOS[1:3], encoder="dinov2")
    with pytest.raises(ClipUnavailableError, match=r"'tiny/videos/99\.mp4' is not in this store's snapshot"):
        store.read(["tiny/videos/99.mp4"], encoder="dinov2")
    with pytest.raises(ClipUnavailableError, match=r"'videos/1\.mp4' .* did you mean 'tiny/videos/1\.mp4'\?"):
        store.read(["videos/1.mp4"], encoder="dinov2")
    with pytest.raises(ClipUnavailableError, match=r"'mp4' is not in this store's snapshot; see store\.clips"):
        store.read(["mp4"], encoder="dinov2")
    with pytest.raises(UserError, match="encoder 'vivit' is not in this store; it has: dinov2"):
        store.read(VIDEOS[:1], encoder="vivit")
    with pytest.raises(UserError, match="clip_ids must be a list"):
        store.read(VIDEOS[0], encoder="dinov2")


def test_two_identities_that_grids_do_not_tell_apart_get_keys_with_their_id(filled, kit, make):
    filled()
    raw = make.identity(pooling="none")
    kit.fill(raw, new_identity=True)
    kit.fill(make.identity(encoder="vivit"))
    store = kit.open()
    keys = sorted(f"dinov2@{identity.id[:6]}" for identity in (raw, make.identity()))
    assert list(store.encoders) == [*keys, "vivit"]
    assert store.encoders[f"dinov2@{raw.id[:6]}"] == raw
    for several in ("dinov2", "dinov2@4x2x2"):
        with pytest.raises(UserError, match=f"'{several}' is .*several identities; name one of: {keys[0]}, {keys[1]}"):
            store.read(VIDEOS[:1], encoder=several)
    assert store.read(VIDEOS[:1], encoder=keys[0]).shape == (1, 4, 2, 2, 8)
    assert set(keys) <= set(store.clips.column_names)


def test_two_grids_of_an_encoder_get_keys_with_their_grid_and_are_found_by_their_id_too(filled, kit, make):
    filled()
    fine, coarse = make.identity(), make.identity(grid=(4, 1, 1))
    kit.fill(coarse, new_identity=True)
    store = kit.open()
    assert dict(store.encoders) == {"dinov2@4x2x2": fine, "dinov2@4x1x1": coarse}
    assert {"dinov2@4x2x2", "dinov2@4x1x1"} <= set(store.clips.column_names)
    stored = store.read(VIDEOS[:2], encoder="dinov2@4x1x1")
    assert stored.shape == (2, 4, 1, 1, 8)
    for digits in (coarse.id[:6], coarse.id):
        assert np.array_equal(store.read(VIDEOS[:2], encoder=f"dinov2@{digits}"), stored)
    digests = {store.data_digest(VIDEOS, [name]) for name in ("dinov2@4x1x1", f"dinov2@{coarse.id[:6]}")}
    assert len(digests) == 1
    for unknown in ("dinov2@4x4x4", f"dinov2@{coarse.id[:5]}", "dinov2@", f"vivit@{coarse.id[:6]}"):
        with pytest.raises(UserError, match="is not in this store; it has: dinov2@4x"):
            store.read(VIDEOS[:1], encoder=unknown)


def test_a_text_means_the_same_identity_or_is_refused_when_the_store_has_grown(filled, kit, make):
    """By a grid, an id or the name alone: one identity, then another grid, then another layer at the second grid."""
    filled()
    fine, coarse = make.identity(), make.identity(grid=(4, 1, 1))
    deep = make.identity(grid=(4, 1, 1), layer="output of block 12 of 24")
    texts = ("dinov2", "dinov2@4x2x2", "dinov2@4x1x1", *(f"dinov2@{one.id[:6]}" for one in (fine, coarse, deep)))

    def meaning():
        store, found = kit.open(), []
        for text in texts:
            try:
                found.append(store.encoders[store.encoder_key(text)])
            except UserError as error:
                found.append("several" if "several identities" in str(error) else None)
        return found

    assert meaning() == [fine, fine, None, fine, None, None]
    kit.fill(coarse, new_identity=True)
    assert meaning() == ["several", fine, coarse, fine, coarse, None]
    kit.fill(deep, new_identity=True)
    assert meaning() == ["several", fine, "several", fine, coarse, deep]
    assert set(kit.open().encoders) == {f"dinov2@{one.id[:6]}" for one in (fine, coarse, deep)}


def test_quarantine_lists_failures_of_clips_and_of_one_encoder(filled, kit, make):
    filled(broken=("videos/2.mp4",))
    vivit = make.identity(encoder="vivit")
    writer = kit.writer()
    group = kit.group(vivit)
    clips = make.clips_by_row(writer)["video"]
    for block in group.missing_blocks():
        block_writer = group.begin(block)
        for row in sorted(block_writer.planned):
            arrays = make.floats(clips[row], vivit)
            arrays["tokens"] *= 1e6 if row == 4 else 1
            block_writer.add(row, arrays, media_sha256=None, decoder=None)
        block_writer.commit()
    writer.publish_snapshot()
    found = [(row["clip_id"], row["encoder"], row["scope"], row["reason"]) for row in kit.open().quarantine.to_pylist()]
    assert found == [
        (VIDEOS[2], "dinov2", "clip", "the file is cut off"),
        (VIDEOS[4], "vivit", "encoder", "tokens overflow float16; store it as bfloat16 (--storage-dtype bfloat16)"),
    ]


def test_samples_come_back_by_name_and_all_together(kit, make):
    def sample(number):
        turns = (Turn(role="human", text="what?"), Turn(role="gpt", text="that"))
        return Sample(sample_id=str(number), clip_id=None, turns=turns, stage="align", source="x")

    writer = kit.writer()
    writer.add_samples("b", [sample(1)])
    writer.add_samples("a", [sample(2)])
    writer.add_samples("b", [sample(3), sample(1)])
    writer.publish_snapshot()
    store = kit.open()
    assert store.sample_names == ["a", "b"]
    assert [s.sample_id for s in store.samples("b")] == ["3", "1"]
    assert [s.sample_id for s in store.samples()] == ["2", "3", "1"]
    with pytest.raises(UserError, match="samples 'c' are not in this store; it has: a, b"):
        store.samples("c")


def test_the_data_digest_follows_the_data_and_not_the_store(filled, kit, make, tmp_path):
    store = filled()
    digest = store.data_digest(VIDEOS[:3], ["dinov2"])
    assert digest == store.data_digest(reversed(VIDEOS[:3]), ["dinov2"])
    shutil.copytree(kit.path, tmp_path / "copy")
    assert FeatureStore.open(tmp_path / "copy").data_digest(VIDEOS[:3], ["dinov2"]) == digest
    union = make.kit(tmp_path / "union", block_rows={"video": 2, "image": 2})
    union.writer().add_clips([make.video(n) for n in (9, 2, 1, 0)])
    union.fill(make.identity())
    assert union.open().data_digest(VIDEOS[:3], ["dinov2"]) == digest
    other = make.kit(tmp_path / "other")
    other.writer().add_clips([make.video(n) for n in range(3)])
    other.fill(make.identity(), noise=1)
    digests = {digest, other.open().data_digest(VIDEOS[:3], ["dinov2"]), store.data_digest(VIDEOS[:2], ["dinov2"])}
    assert len(digests) == 3


def test_info_sums_rows_and_bytes(filled, kit):
    info = filled(broken=("videos/2.mp4",)).info()
    (group,) = info["groups"].values()
    assert info["clips"] == {"video": 6, "image": 4}
    assert group["rows"]["video"] == {"ok": 5, "failed": 1, "skipped": 0, "empty": 2}
    assert group["weights"] == "random:0"
    shards = [path for kind in ("video", "image") for path in (kit.path / kind).rglob("c/*/*/*/*/*")]
    assert info["stored_bytes"] == group["stored_bytes"] == sum(path.stat().st_size for path in shards)


def test_a_store_pickles_as_its_place_and_snapshot(filled, kit, make):
    store = filled()
    store.read(VIDEOS, encoder="dinov2")
    data = pickle.dumps(store)
    assert len(data) < 500
    kit.writer().add_clips([make.video(7)])
    kit.fill()
    again = pickle.loads(data)
    assert again.snapshot == store.snapshot
    assert np.array_equal(again.read(VIDEOS, encoder="dinov2"), store.read(VIDEOS, encoder="dinov2"))


def test_a_path_without_a_store_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where this runs there may be stores nearby
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            StoreNotFoundError, match="make one with `merv-pipeline extract --dataset NAME --store PATH`"
        ):
            FeatureStore.open(path)


def test_a_store_without_a_snapshot_says_how_to_get_one(kit):
    kit.writer()
    with pytest.raises(StoreError, match="has no snapshot yet"):
        kit.open()


def test_a_newer_format_is_refused_with_its_number(filled, kit):
    filled()
    document = json.loads((kit.path / "zarr.json").read_text())
    document["attributes"]["merv_cache"]["format"] = 2
    (kit.path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match="format 2, this version reads format 1; update merv-pipeline"):
        kit.open()


def test_a_flipped_bit_in_a_row_is_an_error_not_a_wrong_number(filled, kit):
    store = filled()
    file = next((kit.path / "video").rglob("tokens/c/0/0/0/0/0"))
    data = bytearray(file.read_bytes())
    data[3] ^= 64
    file.write_bytes(data)
    with pytest.raises(StoreDamagedError, match=r"checksum; run `merv-pipeline verify`"):
        store.read(VIDEOS[:1], encoder="dinov2")
    file.unlink()
    with pytest.raises(StoreDamagedError, match="is missing though its receipt is there"):
        kit.open().read(VIDEOS[:1], encoder="dinov2")


def test_arrays_that_somebody_wrote_with_other_codecs_are_refused_with_the_command_that_rewrites_them(
    filled, kit, storage_dtype
):
    import zarr

    store = filled(storage_dtype=storage_dtype)
    before = store.read(VIDEOS, encoder="dinov2")
    place = next((kit.path / "video").glob("dinov2-*")) / "tokens"
    values = zarr.open_array(place, mode="r")[:]
    shutil.rmtree(place)
    zarr.create_array(place, data=values, chunks=(2, 4, 2, 2, 8), compressors=zarr.codecs.GzipCodec())
    with pytest.raises(StoreFormatError, match="describes chunks or codecs that are not read here; rewrite") as caught:
        kit.open().read(VIDEOS, encoder="dinov2")
    command = str(caught.value)[str(caught.value).index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=kit.path, check=True)
    assert np.array_equal(kit.open().read(VIDEOS, encoder="dinov2"), before)


def test_importing_the_room_loads_nothing_heavy():
    program = "import sys, featurestore; print([m for m in ('torch', 'zarr', 'pyarrow', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_rows_are_of_one_kind_at_a_time(filled):
    store = filled()
    assert store.rows(VIDEOS[:2], encoder="dinov2").tolist() == [0, 1]
    with pytest.raises(UserError, match=r"rows count in one array, and these clips are in several \(image, video\)"):
        store.rows([VIDEOS[0], IMAGES[0]], encoder="dinov2")
