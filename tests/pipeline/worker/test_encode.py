"""Casts on the device: equal to the writer's own, on both sides of every boundary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featurestore.storage_dtypes import STORAGE_DTYPES, OverflowedTokens, to_stored
from pipeline.worker.encode import DEVICE_CASTS, EncodedBatch, HostStaging, fill_slots, storable

LARGEST = {"float16": 65504.0, "bfloat16": float(torch.finfo(torch.bfloat16).max)}
BOUNDARY = {"float16": 65520.0, "bfloat16": 3.3961775292304601e38}  # the first value that rounds to infinity
# One value among ordinary ones, in a clip of its own.
VALUES = [0.0, -0.0, 1e-8, 6e-8, 5.96e-8, 1 + 2**-11, 1 + 3 * 2**-11, 2049.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45]


def clips(values) -> np.ndarray:
    """float32 [B, 2, 3, 3, 4], a clip per value."""
    tokens = np.random.default_rng(0).normal(size=(len(values), 2, 3, 3, 4)).astype(np.float32)
    tokens[:, 1, 2, 0, 3] = values
    return tokens


def encoded(tokens: np.ndarray, dtype: str, prefix: np.ndarray | None = None) -> EncodedBatch:
    floats = {"tokens": torch.from_numpy(tokens)} | ({} if prefix is None else {"prefix": torch.from_numpy(prefix)})
    staging = HostStaging()
    return staging.download(*storable(floats, dtype), staging.mark(), 0).wait(dtype)


def stored_or_reason(arrays, dtype: str):
    """What the writer stores of a clip and None, or None and why it refuses."""
    try:
        return to_stored(arrays, dtype), None
    except OverflowedTokens as error:
        return None, str(error)


@pytest.mark.parametrize("dtype", list(DEVICE_CASTS))
def test_casts_and_overflows_are_those_of_the_writer(dtype):
    edge = np.float32(BOUNDARY[dtype])
    near = [edge, np.nextafter(edge, np.float32(0)), LARGEST[dtype], 65519.0, 65504.5, 65536.0]
    tokens = clips([*VALUES, *near, *(-np.float32(value) for value in near)])
    batch = encoded(tokens, dtype)
    expected = [stored_or_reason({"tokens": clip}, dtype) for clip in tokens]
    assert [batch.overflow(slot) for slot in range(len(tokens))] == [reason for _, reason in expected]
    assert len({reason for _, reason in expected}) == 3  # it fits, it overflows, it is not finite
    for slot, (stored, _) in enumerate(expected):
        if stored is not None:
            found = batch.row(slot)["tokens"]
            assert found.dtype == np.dtype(STORAGE_DTYPES[dtype].zarr_dtype)
            assert found.tobytes() == stored["tokens"].tobytes()


def test_values_between_the_largest_half_and_the_boundary_round_down_and_fit():
    between = np.linspace(65504, np.nextafter(np.float32(65520), np.float32(0)), 50, dtype=np.float32)
    batch = encoded(clips(between), "float16")
    assert all(batch.overflow(slot) is None for slot in range(50))
    assert {float(batch.row(slot)["tokens"][1, 2, 0, 3]) for slot in range(50)} == {65504.0}
    assert encoded(clips([65520.0]), "float16").overflow(0) is not None


def test_prefix_tokens_are_checked_after_the_tokens():
    tokens, prefix = clips([1.0, np.nan, 1.0]), np.ones((3, 2, 5, 4), np.float32)
    prefix[1:] = 1e6
    batch = encoded(tokens, "float16", prefix)
    expected = [stored_or_reason({"tokens": t, "prefix": p}, "float16") for t, p in zip(tokens, prefix, strict=True)]
    reasons = [reason for _, reason in expected]
    assert [batch.overflow(slot) for slot in range(3)] == reasons
    assert batch.row(0)["prefix"].tobytes() == expected[0][0]["prefix"].tobytes()
    assert reasons[0] is None
    assert len(set(reasons)) == 3


def test_what_the_host_casts_comes_as_float32():
    tokens = clips([np.inf, 1.0])
    batch = encoded(tokens, "uint8")
    assert not batch.is_cast
    assert batch.overflow(0) is None
    assert np.array_equal(batch.row(0)["tokens"], tokens[0])


def test_a_used_buffer_shows_nothing_of_the_batch_before():
    buffer = np.full((4, 2, 3), 9, np.uint8)
    frames = {5: np.full((2, 3), 1, np.uint8), 7: np.full((2, 3), 2, np.uint8)}
    batch = fill_slots(frames, [5, 6, 7, None], buffer)
    assert batch is buffer
    assert [set(np.unique(slot)) for slot in batch] == [{1}, {0}, {2}, {0}]
    assert np.array_equal(fill_slots(frames, [5, 6, 7, None]), batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [*DEVICE_CASTS, "uint8"])
def test_a_gpu_gives_the_bytes_of_the_cpu(dtype):
    from pipeline.worker.encode import CudaStaging

    tokens, staging = clips([*VALUES, 65519.0, 65520.0]), CudaStaging("cuda")
    rows = list(range(len(tokens)))
    on_device = staging.upload(dict(enumerate(tokens)), rows)
    began = staging.mark()
    found = staging.download(*storable({"tokens": on_device}, dtype), began, 0).wait(dtype)
    expected = encoded(tokens, dtype)
    for slot in rows:
        assert found.overflow(slot) == expected.overflow(slot)
        if expected.overflow(slot) is None:
            assert found.row(slot)["tokens"].tobytes() == expected.row(slot)["tokens"].tobytes()
