"""Several layers of one encoder: the features and the digest of each are those of the encoder loaded by itself."""

from dataclasses import replace

import pytest
import torch

from mervcache.errors import UserError
from pipeline.encoders import load_encoder
from pipeline.encoders.base import layer_text
from pipeline.encoders.loading import Encoder

from .conftest import BUILT_IN

WITHOUT_NORM = ("languagebind", "clip", "videomae", "videomae2", "pe")


def layers_of(name):
    return ("1", "-2", "-1") if name in WITHOUT_NORM else ("1", "2+norm", "-1", "-1+norm")


@pytest.mark.parametrize(
    ("name", "weights"),
    [*((name, "random:0") for name in BUILT_IN), *((name, "published") for name in ("dinov2", "pe", "videomae2"))],
)
def test_layers_of_one_network_equal_encoders_loaded_one_by_one(name, weights, spec_of, noise, checkpoint):
    spec = spec_of(name)
    source = str(checkpoint(spec)) if weights == "published" else weights
    specs = [spec.with_layer(text) for text in layers_of(name)]
    encoders, frames = Encoder.load_layers(specs, source), noise(spec)
    assert len({id(encoder.network) for encoder in encoders}) == 1
    runs = []
    encoders[0].network.register_forward_hook(lambda *_: runs.append(1))
    found = encoders[0].encode_layers(frames, [each.chosen_layer for each in specs], prefix_tokens=True)
    assert len(runs) == 1
    for one, encoder in zip(specs, encoders, strict=True):
        alone = load_encoder(one, source)
        assert alone.weights_sha256 == encoder.weights_sha256
        for features, expected in zip(found[one.chosen_layer], alone.encode(frames, prefix_tokens=True), strict=True):
            assert (features is None and expected is None) or torch.equal(features, expected)
        assert torch.equal(encoder.encode(frames)[0], found[one.chosen_layer][0])


def test_a_network_whose_layers_share_no_forward_is_loaded_for_each(spec_of, noise):
    from pipeline.encoders.huggingface import HuggingFaceNetwork

    spec = replace(spec_of("dinov2"), builder="tests.pipeline.encoders.test_layers:build_without_blocks")
    specs = [spec.with_layer("1"), spec.with_layer("2")]
    encoders = Encoder.load_layers(specs, "random:0")
    assert isinstance(encoders[0].network, HuggingFaceNetwork)
    assert encoders[0].network is not encoders[1].network
    for one, encoder in zip(specs, encoders, strict=True):
        assert torch.equal(encoder.encode(noise(spec))[0], load_encoder(one, "random:0").encode(noise(spec))[0])


def build_without_blocks(spec):
    """As a plug-in that does not say where its blocks are."""
    from pipeline.encoders.published import build_dinov2

    network = build_dinov2(spec)
    network._blocks = None
    return network


def test_layers_are_numbered_from_either_end(spec_of):
    spec = spec_of("dinov2")
    assert spec.with_layer("-1").layer == spec.with_layer("3").layer == "output of block 3 of 3, no final norm"
    assert spec.with_layer("-3+norm").layer == "output of block 1 of 3, then the final norm"
    for text in ("1", "2+norm"):
        assert layer_text(spec.with_layer(text).layer) == text
    assert layer_text("some other output") is None
    for text in ("0", "4", "-4", "1.5", "", "norm", "2+norms"):
        with pytest.raises(UserError, match="layer"):
            spec.with_layer(text)
