"""Perception Encoder against timm's own model, VideoMAE v2 against plain tensor operations on its checkpoint."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mervcache.errors import UserError
from pipeline.encoders import ENCODERS, load_encoder
from pipeline.encoders.network import build_network


def scaled(frames_THWC, mean, std):
    values = (frames_THWC.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(values).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("image_size", [32, 256])  # fewer positions than the published 32 x 32, and as many
def test_pe_equals_timms_forward(image_size, spec_of, noise, checkpoint, published_model):
    spec = spec_of("pe").with_architecture({"image_size": image_size, "num_frames": 1})
    encoder, frames = load_encoder(spec, str(checkpoint(spec_of("pe")))), noise(spec)
    plain = copy.deepcopy(published_model(spec_of("pe")))
    plain.set_input_size(img_size=image_size)
    with torch.no_grad():
        expected = plain.forward_features(scaled(frames[:, 0], [0.5] * 3, [0.5] * 3))
    features, prefix = encoder.encode(frames, prefix_tokens=True)
    assert expected.std() > 0.3
    torch.testing.assert_close(features[:, 0].flatten(1, 2), expected[:, 1:], rtol=0, atol=5e-5)
    torch.testing.assert_close(prefix[:, 0], expected[:, :1], rtol=0, atol=5e-5)


def test_pe_at_its_published_size_has_the_parameters_of_timms_model():
    """Without storage: all of PE-Lang L/14 but nothing after its blocks."""
    parameters = sum(parameter.numel() for parameter in build_network(ENCODERS["pe"]).parameters())
    assert parameters / 1e6 == pytest.approx(291.42, abs=0.01)


def plain_videomae2(weights, frames_THWC, num_heads):
    """Features [T, H, W, D] of one clip, by the published description: tubelets, sine table, pre-norm blocks."""
    pixels_CTHW = scaled(frames_THWC, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).permute(1, 0, 2, 3)
    kernel = weights["patch_embed.proj.weight"]
    patches = F.conv3d(pixels_CTHW[None], kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[2:])
    shape, tokens = patches.shape[2:], patches[0].flatten(1).T
    count, width = tokens.shape
    angles = np.arange(count)[:, None] / 10000 ** (2 * (np.arange(width) // 2) / width)
    table = np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles))
    tokens = tokens + torch.from_numpy(table).float()
    for layer in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks"))):
        block = {name.removeprefix(f"blocks.{layer}."): w for name, w in weights.items()}
        normed = F.layer_norm(tokens, (width,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        bias = torch.cat([block["attn.q_bias"], torch.zeros(width), block["attn.v_bias"]])
        qkv = F.linear(normed, block["attn.qkv.weight"], bias)
        query, key, value = qkv.reshape(count, 3, num_heads, -1).permute(1, 2, 0, 3)
        weight = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        mixed = (weight @ value).transpose(0, 1).flatten(1)
        tokens = tokens + F.linear(mixed, block["attn.proj.weight"], block["attn.proj.bias"])
        normed = F.layer_norm(tokens, (width,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        hidden = F.gelu(F.linear(normed, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        tokens = tokens + F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    return tokens.reshape(*shape, width)


@pytest.mark.parametrize("prefix", ["model.", ""])  # of the Hub's repository, and of the authors' files
def test_videomae2_equals_the_published_computation(prefix, spec_of, noise, checkpoint, tmp_path):
    spec, folder = spec_of("videomae2"), checkpoint(spec_of("videomae2"))
    weights = {name.removeprefix("model."): w for name, w in load_file(folder / "model.safetensors").items()}
    save_file({prefix + name: w for name, w in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    frames = noise(spec, batch=1)
    expected = plain_videomae2(weights, frames[0], spec.architecture["num_heads"])
    features, _ = load_encoder(spec, str(tmp_path)).encode(frames)
    assert expected.std() > 0.3
    torch.testing.assert_close(features[0], expected, rtol=0, atol=5e-5)


def test_a_videomae2_checkpoint_of_another_size_or_with_less_is_refused(spec_of, checkpoint, tmp_path):
    spec, folder = spec_of("videomae2"), checkpoint(spec_of("videomae2"))
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    del weights["model.blocks.2.attn.v_bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"incomplete: 1 missing, blocks\.2\.attn\.v_bias first"):
        load_encoder(spec, str(tmp_path))
    config["model_config"]["num_heads"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_heads is 8 there, 4 here"):
        load_encoder(spec, str(tmp_path))


def test_sizes_that_pe_does_not_have_are_refused(spec_of):
    with pytest.raises(UserError, match="activation of pe is 'gelu', got 'quick_gelu'"):
        load_encoder(spec_of("pe").with_architecture({"activation": "quick_gelu"}), "random:0")
