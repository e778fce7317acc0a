"""A store is plain Zarr v3: zarr-python, tensorstore and xarray read the same bits as we do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import zarr

from featurestore.identity import FeatureIdentity
from featurestore.objects.open import open_objects
from featurestore.reader import GroupReader

CASES = [("float16", "blosc"), ("float16", "none"), ("bfloat16", "blosc"), ("uint8", "blosc"), ("uint8", "none")]


@pytest.fixture(params=CASES, ids="-".join)
def filled(request, kit, make):
    """(store, its group's folder) with a failed row and an unused tail."""
    storage_dtype, codec = request.param
    kit.writer().add_clips([make.video(n) for n in range(6)])
    identity = make.identity(storage_dtype=storage_dtype, prefix_tokens=3)
    kit.fill(identity, broken=("videos/1.mp4",), codec=codec)
    return kit.open(), kit.path / "video" / identity.group_name


def stored_rows(store, folder, array):
    """Rows as the direct reader gives them, and which are there."""
    reader = GroupReader(open_objects(store.path), "video", store.encoders["dinov2"])
    ids = [f"tiny/videos/{n}.mp4" for n in (0, 2, 3, 4, 5)]
    rows = {}
    for row in store.rows(ids, encoder="dinov2"):
        out = np.empty(reader.specs[array].row_shape, dtype=reader.specs[array].dtype)
        reader.read_stored(array, int(row), out)
        rows[int(row)] = out
    return rows


def arrays_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_zarr_python_reads_the_same_bits(filled):
    store, folder = filled
    for name in arrays_of(folder):
        array = zarr.open_array(folder / name, mode="r")
        assert array.shape[0] == 8
        for row, expected in stored_rows(store, folder, name).items():
            assert array[row].tobytes() == expected.tobytes()


def test_missing_rows_read_as_the_fill_value(filled):
    _, folder = filled
    array = zarr.open_array(folder / "tokens", mode="r")
    for row in (1, 6, 7):
        fill = np.full(array.shape[1:], array.fill_value, dtype=array.dtype)
        assert array[row].tobytes() == fill.tobytes()
    if array.dtype == np.float16:
        assert np.isnan(array[1]).all()


def test_tensorstore_reads_the_same_bits(filled):
    import tensorstore

    store, folder = filled
    for name in arrays_of(folder):
        kvstore = {"driver": "file", "path": str(folder / name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        for row, expected in stored_rows(store, folder, name).items():
            assert array[row].read().result().tobytes() == expected.tobytes()


def test_xarray_reads_the_same_bits_with_named_axes(filled):
    import xarray

    store, folder = filled
    dataset = xarray.open_zarr(folder, consolidated=False, zarr_format=3, mask_and_scale=False, chunks=None)
    assert dataset["tokens"].dims == ("row", "time", "height", "width", "channel")
    for row, expected in stored_rows(store, folder, "tokens").items():
        assert dataset["tokens"][row].values.tobytes() == expected.tobytes()


def test_a_group_carries_its_whole_identity_and_batch_shape(filled):
    store, folder = filled
    attributes = zarr.open_group(folder, mode="r").attrs.asdict()
    assert FeatureIdentity.from_dict(attributes["identity"]) == store.encoders["dinov2"]
    assert (attributes["weights"], attributes["batch_shape"]) == ("random:0", 2)


def test_a_store_can_be_walked_from_its_root(filled):
    _, folder = filled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # folders outside the Zarr hierarchy: clips, receipts, snapshots
        root = zarr.open_group(folder.parents[1], mode="r")
        assert "tokens" in root[f"video/{folder.name}"]
        assert [name for name, _ in root["video"].groups()] == [folder.name]
    assert root.attrs["merv_cache"]["format"] == 1


def test_bfloat16_bits_are_marked_and_view_as_torch_bfloat16(kit, make):
    import torch

    kit.writer().add_clips([make.video(0)])
    identity = make.identity(storage_dtype="bfloat16")
    kit.fill(identity)
    array = zarr.open_array(kit.path / "video" / identity.group_name / "tokens", mode="r")
    assert array.attrs["logical_dtype"] == "bfloat16"
    tokens = torch.from_numpy(array[0]).view(torch.bfloat16).float().numpy()
    assert np.array_equal(tokens, kit.open().read(["tiny/videos/0.mp4"], encoder="dinov2")[0])
    assert torch.isnan(torch.from_numpy(array[1]).view(torch.bfloat16)).all()
