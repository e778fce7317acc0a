"""Storage dtypes lose no more than they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featurestore.storage_dtypes import (
    OverflowedTokens,
    from_bfloat16_bits,
    from_stored,
    to_bfloat16_bits,
    to_float16,
    to_stored,
    to_uint8,
)
from mervcache.errors import UserError

FLOATS = hnp.arrays(np.float32, (3, 2, 2, 5), elements=st.floats(-1e4, 1e4, width=32))


@given(FLOATS)
def test_float16_is_within_half_a_unit_in_the_last_place(tokens):
    error = np.abs(to_float16(tokens).astype(np.float64) - tokens)
    assert (error <= np.maximum(np.abs(tokens) * 2.0**-11, 2.0**-25)).all()


@given(FLOATS)
def test_bfloat16_bits_are_those_of_torch(tokens):
    expected = torch.from_numpy(tokens).bfloat16()
    bits = to_bfloat16_bits(tokens)
    assert (bits == expected.view(torch.uint16).numpy()).all()
    assert (from_bfloat16_bits(bits) == expected.float().numpy()).all()


@settings(max_examples=200)
@given(FLOATS)
def test_uint8_is_within_half_a_step_of_each_channel(tokens):
    stored = to_uint8(tokens)
    read = from_stored(stored["tokens"], logical_dtype=None, scale=stored["scale"], offset=stored["offset"])
    span = tokens.max(axis=(0, 1, 2)).astype(np.float64) - tokens.min(axis=(0, 1, 2))
    magnitude = np.abs(tokens).max(axis=(0, 1, 2))
    assert (np.abs(read - tokens) <= span / 255 / 2 + magnitude * 1e-6 + 1e-37).all()


def test_a_constant_channel_is_exact_in_uint8():
    stored = to_uint8(np.full((2, 1, 1, 1), 3.25, dtype=np.float32))
    assert (
        from_stored(stored["tokens"], logical_dtype=None, scale=stored["scale"], offset=stored["offset"]).max() == 3.25
    )


def test_overflow_of_float16_hints_at_bfloat16_and_names_no_value():
    tokens = np.full((1, 1, 1, 2), 7e4, dtype=np.float32)
    with pytest.raises(OverflowedTokens, match=r"^tokens overflow float16; store it as bfloat16") as caught:
        to_stored({"tokens": tokens}, "float16")
    assert "70000" not in str(caught.value)
    assert np.allclose(from_bfloat16_bits(to_stored({"tokens": tokens}, "bfloat16")["tokens"]), tokens, rtol=2**-8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tokens_that_are_not_finite_are_refused_by_every_dtype(dtype, value):
    tokens = np.zeros((1, 1, 1, 2), dtype=np.float32)
    tokens[0, 0, 0, 1] = value
    with pytest.raises(OverflowedTokens, match="not finite"):
        to_stored({"tokens": tokens}, dtype)


def test_the_largest_float32_overflows_bfloat16_by_rounding():
    with pytest.raises(OverflowedTokens, match="tokens overflow bfloat16"):
        to_bfloat16_bits(np.array([np.finfo(np.float32).max]))


def test_prefix_tokens_of_a_uint8_store_are_float16():
    tokens = np.ones((1, 1, 1, 2), dtype=np.float32)
    assert to_stored({"tokens": tokens, "prefix": tokens[0]}, "uint8")["prefix"].dtype == np.float16


def test_unknown_storage_dtypes_are_listed():
    with pytest.raises(UserError, match="float16, bfloat16, uint8, got 'int4'"):
        to_stored({"tokens": np.zeros(1)}, "int4")
