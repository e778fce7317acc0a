"""Storage dtypes: bounded errors, refused overflow, and a new dtype as one entry of the table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featurestore.storage_dtypes import (
    STORAGE_DTYPES,
    OverflowedTokens,
    StorageDtype,
    from_stored,
    to_stored,
)
from mervcache.errors import UserError

FLOATS = hnp.arrays(np.float32, (3, 2, 2, 5), elements=st.floats(-1e4, 1e4, width=32))


def round_trip(tokens: np.ndarray, dtype: str) -> np.ndarray:
    return from_stored(to_stored({"tokens": tokens}, dtype), dtype)["tokens"]


@given(FLOATS)
def test_float16_is_within_half_a_unit_in_the_last_place(tokens):
    error = np.abs(round_trip(tokens, "float16").astype(np.float64) - tokens)
    assert (error <= np.maximum(np.abs(tokens) * 2.0**-11, 2.0**-25)).all()


@given(FLOATS)
def test_bfloat16_bits_are_those_of_torch(tokens):
    expected = torch.from_numpy(tokens).bfloat16()
    assert (to_stored({"tokens": tokens}, "bfloat16")["tokens"] == expected.view(torch.uint16).numpy()).all()
    assert (round_trip(tokens, "bfloat16") == expected.float().numpy()).all()


@settings(max_examples=200)
@given(FLOATS)
def test_uint8_is_within_half_a_step_of_each_channel(tokens):
    span = tokens.max(axis=(0, 1, 2)).astype(np.float64) - tokens.min(axis=(0, 1, 2))
    magnitude = np.abs(tokens).max(axis=(0, 1, 2))
    error = np.abs(round_trip(tokens, "uint8") - tokens)
    assert (error <= span / 255 / 2 + magnitude * 1e-6 + 1e-37).all()


def test_a_constant_channel_is_exact_in_uint8():
    assert round_trip(np.full((2, 1, 1, 1), 3.25, dtype=np.float32), "uint8").max() == 3.25


def test_overflow_of_float16_hints_at_bfloat16_and_names_no_value():
    tokens = np.full((1, 1, 1, 2), 7e4, dtype=np.float32)
    with pytest.raises(OverflowedTokens, match=r"^tokens overflow float16; store it as bfloat16") as caught:
        to_stored({"tokens": tokens}, "float16")
    assert "70000" not in str(caught.value)
    assert np.allclose(round_trip(tokens, "bfloat16"), tokens, rtol=2**-8)


@pytest.mark.parametrize("dtype", list(STORAGE_DTYPES))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tokens_that_are_not_finite_are_refused_by_every_dtype(dtype, value):
    tokens = np.zeros((1, 1, 1, 2), dtype=np.float32)
    tokens[0, 0, 0, 1] = value
    with pytest.raises(OverflowedTokens, match="not finite"):
        to_stored({"tokens": tokens}, dtype)


def test_the_largest_float32_overflows_bfloat16_by_rounding():
    with pytest.raises(OverflowedTokens, match="tokens overflow bfloat16"):
        to_stored({"tokens": np.array([np.finfo(np.float32).max])}, "bfloat16")


def test_prefix_tokens_of_a_uint8_store_are_float16():
    tokens = np.ones((1, 1, 1, 2), dtype=np.float32)
    stored = to_stored({"tokens": tokens, "prefix": tokens[0]}, "uint8")
    assert stored["prefix"].dtype == from_stored(stored, "uint8")["prefix"].dtype == np.float16


def test_unknown_storage_dtypes_are_listed():
    with pytest.raises(UserError, match="float16, bfloat16, uint8, got 'int4'"):
        to_stored({"tokens": np.zeros(1)}, "int4")


def _from_sixteenths(items, _sidecars, out):
    np.multiply(items.astype(np.float32) - 128, 1 / 16, out=out)


# Kept as Zarr's uint8, as the affine dtype is: an array's meaning is its logical dtype, not its Zarr data type.
SIXTEENTHS = StorageDtype(
    zarr_dtype="uint8",
    fill_value=255,
    item_bytes=1,
    to_stored=lambda tokens: {"tokens": np.rint(tokens * 16 + 128).clip(0, 254).astype(np.uint8)},
    from_stored=_from_sixteenths,
    step=2**-5,
    error="1/32",
)


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_a_new_dtype_is_one_entry_of_the_table(monkeypatch, kit, make, codec):
    monkeypatch.setitem(STORAGE_DTYPES, "sixteenths", SIXTEENTHS)
    identity = make.identity(storage_dtype="sixteenths", prefix_tokens=3)
    clips = [*map(make.video, range(5)), *map(make.image, range(2))]
    kit.writer().add_clips(clips)
    kit.fill(identity, codec=codec)
    kit.fill(make.identity(encoder="other", storage_dtype="uint8"))
    store = kit.open()
    ids = [clip.clip_id for clip in clips]
    for read, name in ((store.read, "tokens"), (store.read_prefix, "prefix")):
        values = read(ids, encoder="dinov2")
        rows = [make.floats(clip, identity)[name] for clip in clips]
        expected = np.stack([row[np.arange(4) % len(row)] for row in rows])  # a still's period repeats
        assert values.dtype == np.float32
        assert np.array_equal(values, np.rint(expected * 16) / 16)
    document = json.loads(next(kit.path.glob("video/dinov2-*/tokens/zarr.json")).read_text())
    assert (document["data_type"], document["fill_value"]) == ("uint8", 255)
    assert document["attributes"] == {"logical_dtype": "sixteenths"}
    affine = json.loads(next(kit.path.glob("video/other-*/tokens/zarr.json")).read_text())
    assert (affine["data_type"], affine["fill_value"], affine["attributes"]) == ("uint8", 0, {})
    exact = make.floats(clips[0], store.encoders["other"])["tokens"]
    assert np.abs(store.read(ids[:1], encoder="other")[0] - exact).max() < 0.02
