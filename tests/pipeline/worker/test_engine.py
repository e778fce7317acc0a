"""A worker's engine: batches of one shape, halved where memory is short, kept between blocks."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from featurestore.clips import Clip
from mervcache.errors import UserError
from pipeline.decode.sampling import DecodeJob
from pipeline.worker.encode import TokenEncoder, encode_batch
from pipeline.worker.engine import Engine, close_engines, decode_job, describe_encoders, engine_for


@pytest.fixture(scope="module")
def run(extracted) -> TokenEncoder:
    return TokenEncoder(extracted.config(encoders=["siglip"]).encoder_settings[0], "cpu")


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)


def test_a_clip_has_the_same_bits_alone_or_with_any_neighbours(run):
    alone, _ = encode_batch(run, {7: noise(7)}, [7, None, None])
    together, _ = encode_batch(run, {7: noise(7), 8: noise(8), 9: noise(9)}, [7, 8, 9])
    last, _ = encode_batch(run, {7: noise(7), 5: noise(5)}, [5, 6, 7])  # row 6 did not decode
    assert alone["tokens"].shape == (3, 8, 3, 3, 32)
    assert np.array_equal(alone["tokens"][0], together["tokens"][0])
    assert np.array_equal(alone["tokens"][0], last["tokens"][2])
    assert not np.array_equal(alone["tokens"][0], together["tokens"][1])


class ShortOfMemory(TokenEncoder):
    """An encoder on a device that holds `capacity` clips."""

    def encode(self, frames_BTHWC):
        if len(frames_BTHWC) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().encode(frames_BTHWC)


@pytest.mark.parametrize(("clips", "capacity", "halvings"), [(4, 4, 0), (4, 2, 1), (4, 1, 3), (5, 2, 2), (5, 1, 4)])
def test_a_batch_too_large_is_halved_until_it_fits_in_the_order_of_its_rows(clips, capacity, halvings, run, extracted):
    short = ShortOfMemory(extracted.config(encoders=["siglip"]).encoder_settings[0], "cpu")
    short.capacity = capacity
    frames = {row: noise(row) for row in range(clips)}
    expected, _ = encode_batch(run, frames, range(clips))
    found, counted = encode_batch(short, frames, range(clips))
    np.testing.assert_allclose(found["tokens"], expected["tokens"], rtol=0, atol=1e-5)
    assert counted == halvings


def test_one_clip_that_does_not_fit_is_the_machines_error(run, extracted):
    short = ShortOfMemory(extracted.config(encoders=["siglip"]).encoder_settings[0], "cpu")
    short.capacity = 0
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


def test_the_description_of_an_encoder_is_whole_and_can_be_pickled(extracted):
    config = extracted.config(encoders=["dinov2", "siglip"], prefix_tokens=True, crop={"siglip": "centre-crop"})
    described = describe_encoders(config.engine_settings)
    assert pickle.loads(pickle.dumps(described)) == described
    assert list(described) == ["dinov2", "siglip"]
    dinov2, siglip = described.values()
    assert (dinov2.identity.encoder, dinov2.weights_label, dinov2.device) == ("dinov2", "random:0", "cpu")
    assert dinov2.threads == torch.get_num_threads()
    assert (dinov2.identity.prefix_tokens, siglip.identity.prefix_tokens) == (5, 0)  # SigLIP has none
    assert siglip.identity.preprocessing["fit"] == "centre-crop"
    assert dinov2.identity.preprocessing["fit"] == "squash"
    assert dinov2.identity.grid == (8, 3, 3)
    close_engines()


def test_encoders_ask_for_each_view_of_a_clip_once_and_agree_on_the_decoder(extracted):
    settings = extracted.config(encoders=["dinov2", "siglip", "languagebind"]).engine_settings
    dinov2, siglip, languagebind = (TokenEncoder(each, "cpu") for each in settings.encoders)
    assert dinov2.view == siglip.view != languagebind.view
    clip, views = Clip(dataset="d", path="a.mp4", kind="video"), (dinov2.view, languagebind.view)
    job = decode_job("media", clip, [dinov2, siglip, languagebind], accept_damaged=True)
    assert job == DecodeJob(root="media", clip=clip, views=views, decoder="frames/1", accept_damaged=True)
    other = TokenEncoder(replace(settings.encoders[1], decoder="decord"), "cpu")
    with pytest.raises(ValueError, match="too many values"):
        decode_job("media", clip, [dinov2, other])


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused_by_name(device, extracted):
    config = extracted.config(encoders=["siglip"], device=device)
    with pytest.raises(UserError, match=re.escape(f"device {device!r} cannot be used here: ")):
        Engine(config.engine_settings)
