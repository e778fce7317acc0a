"""A worker's engine: batches of one shape, halved where memory is short, kept between blocks."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from featurestore.errors import UserError
from pipeline.engine import EncoderRun, Engine, close_engines, describe_encoders, encode_batch, engine_for


@pytest.fixture(scope="module")
def run(extracted) -> EncoderRun:
    return EncoderRun(extracted.config(encoders=["siglip"]).encoder_settings[0], "cpu")


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)


def test_a_clip_has_the_same_bits_whoever_sits_beside_it_or_nobody(run):
    alone, _ = encode_batch(run, {7: noise(7)}, [7, None, None])
    beside, _ = encode_batch(run, {7: noise(7), 8: noise(8), 9: noise(9)}, [7, 8, 9])
    last, _ = encode_batch(run, {7: noise(7), 5: noise(5)}, [5, 6, 7])  # row 6 did not decode
    assert alone["tokens"].shape == (3, 8, 3, 3, 32)
    assert np.array_equal(alone["tokens"][0], beside["tokens"][0])
    assert np.array_equal(alone["tokens"][0], last["tokens"][2])
    assert not np.array_equal(alone["tokens"][0], beside["tokens"][1])


class ShortOfMemory(EncoderRun):
    """An encoder on a device that holds `room` clips."""

    def tokens(self, frames_BTHWC):
        if len(frames_BTHWC) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().tokens(frames_BTHWC)


@pytest.mark.parametrize(("clips", "room", "halvings"), [(4, 4, 0), (4, 2, 1), (4, 1, 3), (5, 2, 2), (5, 1, 4)])
def test_a_batch_too_large_is_halved_until_it_fits_in_the_order_of_its_rows(clips, room, halvings, run, extracted):
    short = ShortOfMemory(extracted.config(encoders=["siglip"]).encoder_settings[0], "cpu")
    short.room = room
    frames = {row: noise(row) for row in range(clips)}
    expected, _ = encode_batch(run, frames, range(clips))
    found, counted = encode_batch(short, frames, range(clips))
    np.testing.assert_allclose(found["tokens"], expected["tokens"], rtol=0, atol=1e-5)
    assert counted == halvings


def test_one_clip_that_does_not_fit_is_the_machines_error(run, extracted):
    short = ShortOfMemory(extracted.config(encoders=["siglip"]).encoder_settings[0], "cpu")
    short.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        encode_batch(short, {0: noise(0)}, [0, None])


def test_an_engine_is_kept_for_the_same_settings_and_closed_for_others(extracted):
    settings = extracted.config(encoders=["siglip"]).engine_settings
    other = extracted.config(encoders=["dinov2"]).engine_settings
    first = engine_for(settings)
    assert engine_for(extracted.config(encoders=["siglip"]).engine_settings) is first
    second = engine_for(other)
    assert list(second.encoders) == ["dinov2"]
    assert engine_for(settings) is not first
    close_engines()


def test_what_the_driver_is_told_of_an_encoder_is_plain_and_whole(extracted):
    config = extracted.config(encoders=["dinov2", "siglip"], prefix_tokens=True, crop={"siglip": "centre-crop"})
    dinov2, siglip = describe_encoders(config.engine_settings)
    assert (dinov2["name"], dinov2["weights"], dinov2["device"]) == ("dinov2", "random:0", "cpu")
    assert dinov2["threads"] == torch.get_num_threads()
    assert (dinov2["identity"]["prefix_tokens"], siglip["identity"]["prefix_tokens"]) == (5, 0)  # SigLIP has none
    assert siglip["identity"]["preprocessing"]["fit"] == "centre-crop"
    assert dinov2["identity"]["preprocessing"]["fit"] == "squash"
    assert dinov2["identity"]["grid"] == [8, 3, 3]
    close_engines()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused_by_name(device, extracted):
    config = extracted.config(encoders=["siglip"], device=device)
    with pytest.raises(UserError, match=re.escape(f"device {device!r} cannot be used here: ")):
        Engine(config.engine_settings)
