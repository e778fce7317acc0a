"""LanguageBind's tower against a slow reference: float64 numpy, loops over frames and positions, plain softmax."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mervcache.errors import UserError
from pipeline.encoders import ENCODERS, load_encoder
from pipeline.encoders.network import build_network

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HEADS = 2
SMALL = {"image_size": 16, "patch_size": 8, "hidden_size": 12, "num_layers": 3, "num_heads": HEADS}


@pytest.fixture(scope="module")
def spec():
    return ENCODERS["languagebind"].with_architecture(SMALL)


def norm(x, weights, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def dense(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(x_LD, weights, name):
    """Self-attention over the rows of one sequence, head by head, query by query."""
    query, key, value = (dense(x_LD, weights, f"{name}.{part}_proj") for part in "qkv")
    mixed, head_width = np.zeros_like(x_LD), x_LD.shape[1] // HEADS
    for head in range(HEADS):
        columns = slice(head * head_width, (head + 1) * head_width)
        for row in range(len(x_LD)):
            scores = np.array([query[row, columns] @ key[other, columns] for other in range(len(x_LD))])
            exponentials = np.exp(scores / math.sqrt(head_width) - scores.max() / math.sqrt(head_width))
            mixed[row, columns] = exponentials / exponentials.sum() @ value[:, columns]
    return dense(mixed, weights, f"{name}.out_proj")


def gelu(x):
    return x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)


def reference_chunk(frames_THWC, weights):
    """One chunk of 8 frames -> output of the second to last block [8, 1 + P, D], class token first."""
    get = {name.removeprefix("vision_model."): w.double().numpy() for name, w in weights.items()}
    hidden = []
    for frame in frames_THWC:
        pixels = (frame / 255.0 - MEAN) / STD
        tokens = [get["embeddings.class_embedding"]]
        for row in range(2):
            for column in range(2):
                patch = pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].transpose(2, 0, 1)
                tokens.append((get["embeddings.patch_embedding.weight"] * patch).sum(axis=(1, 2, 3)))
        hidden.append(norm(np.stack(tokens) + get["embeddings.position_embedding.weight"], get, "pre_layrnorm"))
    hidden = np.stack(hidden)
    for layer in range(2):
        block = {key.split(f"layers.{layer}.")[1]: w for key, w in get.items() if f"layers.{layer}." in key}
        for position in range(hidden.shape[1]):
            track = hidden[:, position] + block["temporal_embedding"][0]
            hidden[:, position] = track + attention(norm(track, block, "temporal_layer_norm1"), block, "temporal_attn")
        for t in range(len(hidden)):
            x = hidden[t]
            x = x + attention(norm(x, block, "layer_norm1"), block, "self_attn")
            hidden[t] = x + dense(gelu(dense(norm(x, block, "layer_norm2"), block, "mlp.fc1")), block, "mlp.fc2")
    return hidden


def test_sixteen_frames_equal_the_slow_reference_run_on_each_half(spec, checkpoint, noise):
    weights = load_file(checkpoint(spec) / "model.safetensors")
    weights = {name: w for name, w in weights.items() if name.startswith("vision_model.")}
    clip = noise(spec, batch=1, seed=5)
    halves = [reference_chunk(clip[0, half], weights) for half in (slice(0, 8), slice(8, 16))]
    expected = np.concatenate(halves)
    features, prefix = load_encoder(spec, str(checkpoint(spec))).encode(clip, prefix_tokens=True)
    assert expected.std() > 0.3
    np.testing.assert_allclose(features[0].flatten(1, 2).numpy(), expected[:, 1:], rtol=0, atol=2e-5)
    np.testing.assert_allclose(prefix[0].numpy(), expected[:, :1], rtol=0, atol=2e-5)


def test_sixteen_frames_are_two_independent_eights(spec, noise):
    clip = noise(spec)
    whole, _ = load_encoder(spec, "random:0").encode(clip)
    eights = load_encoder(spec.with_architecture({"num_frames": 8}), "random:0")
    both = torch.cat([eights.encode(clip[:, :8])[0], eights.encode(clip[:, 8:])[0]], dim=1)
    torch.testing.assert_close(whole, both, rtol=0, atol=1e-6)


def test_frames_see_each_other_within_a_half_and_not_across(spec, noise):
    encoder, clip = load_encoder(spec, "random:0"), noise(spec)
    changed = clip.copy()
    changed[:, 3] = 255 - changed[:, 3]
    moved = (encoder.encode(changed)[0] - encoder.encode(clip)[0]).abs().amax(dim=(0, 2, 3, 4))
    assert (moved[:8] > 1e-4).all()
    assert (moved[8:] == 0).all()


def test_the_networks_names_and_shapes_are_the_published_ones_at_real_size(languagebind_names):
    spec = ENCODERS["languagebind"]
    published = languagebind_names(spec.architecture)
    ours = {name: tuple(w.shape) for name, w in build_network(spec).state_dict().items()}
    skipped = {name for name in published if "layers.23." in name or "post_layernorm" in name}
    assert ours == {name: shape for name, shape in published.items() if name not in skipped}
    assert sum(math.prod(shape) for shape in published.values()) == 404_187_136
    assert ours["vision_model.encoder.layers.22.temporal_embedding"] == (1, 8, 1024)


def test_unmerged_lora_weights_are_refused_with_the_merged_repository(spec, checkpoint, tmp_path):
    weights = load_file(checkpoint(spec) / "model.safetensors")
    unmerged = {name.replace("encoder.layers", "encoder.base_model.model.layers"): w for name, w in weights.items()}
    save_file(unmerged, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint(spec) / "config.json").read_text())
    with pytest.raises(UserError, match=r"incomplete: 54 missing.*_Video_merge"):
        load_encoder(spec, str(tmp_path))


@pytest.mark.parametrize(("key", "value"), [("num_frames", 16), ("add_time_attn", False), ("hidden_act", "quick_gelu")])
def test_a_config_that_contradicts_what_shapes_cannot_show_is_refused(key, value, spec, checkpoint, tmp_path):
    config = json.loads((checkpoint(spec) / "config.json").read_text())
    config["vision_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((checkpoint(spec) / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=f"another architecture than languagebind: {key} is {value!r} there"):
        load_encoder(spec, str(tmp_path))


def test_a_folder_without_config_is_refused(spec, checkpoint, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((checkpoint(spec) / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"has no config.json; copy it from LanguageBind/"):
        load_encoder(spec, str(tmp_path))


def test_a_final_norm_over_all_tokens_is_refused_since_the_family_has_none(spec):
    with pytest.raises(UserError, match=r"no final norm .* leave final_norm out"):
        load_encoder(replace(spec, final_norm=True), "random:0")


def test_an_activation_that_the_tower_does_not_have_is_refused(spec):
    with pytest.raises(UserError, match="activation of languagebind must be one of gelu, quick_gelu"):
        load_encoder(spec.with_architecture({"activation": "gelu_fast"}), "random:0")
