"""The contract of every encoder, at toy size: shapes, stills, bits, checkpoints, refusals."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mervcache.errors import UserError
from pipeline.align import align
from pipeline.encoders import load_encoder
from pipeline.encoders.base import feature_identity

BUILT_IN = ("languagebind", "dinov2", "vivit", "siglip", "clip", "videomae", "siglip2", "dinov3", "vjepa2")
BUILT_IN += ("pe", "videomae2", "depthanything")
GRIDS = dict.fromkeys(BUILT_IN, (16, 4, 4)) | {"videomae": (8, 4, 4), "videomae2": (8, 4, 4)}
PERIODS = {"languagebind": 8, "dinov2": 1, "vivit": 16, "siglip": 1, "clip": 1, "videomae": 8} | {
    "siglip2": 1,
    "dinov3": 1,
    "vjepa2": 16,
    "pe": 1,
    "videomae2": 8,
    "depthanything": 1,
}
PREFIXES = {"languagebind": 1, "dinov2": 5, "vivit": 1, "siglip": 0, "clip": 1, "videomae": 0} | {
    "siglip2": 0,
    "dinov3": 5,
    "vjepa2": 0,
    "pe": 1,
    "videomae2": 0,
    "depthanything": 1,
}

every_encoder = pytest.mark.parametrize("name", BUILT_IN)
with_prefix = pytest.mark.parametrize("name", [name for name in BUILT_IN if PREFIXES[name]])


@every_encoder
def test_videos_give_features_on_the_declared_grid(name, toy, noise):
    encoder = toy(name)
    features, prefix = encoder.encode(noise(encoder.spec, batch=3))
    assert encoder.spec.grid == GRIDS[name]
    assert features.shape == (3, *GRIDS[name], 32)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert prefix is None


@every_encoder
def test_a_still_gives_one_period_and_the_period_repeats_in_the_whole_clip(name, toy, noise):
    encoder = toy(name)
    still = noise(encoder.spec, num_frames=1)
    one_period, _ = encoder.encode(still)
    whole, _ = encoder.encode(np.repeat(still, encoder.spec.num_frames, axis=1))
    assert one_period.shape[1] == encoder.spec.still_period == PERIODS[name]
    repeated = one_period.repeat(1, GRIDS[name][0] // PERIODS[name], 1, 1, 1)
    torch.testing.assert_close(repeated, whole, rtol=0, atol=2e-5)


@with_prefix
def test_prefix_tokens_come_on_request_for_every_time_step(name, toy, noise):
    encoder = toy(name)
    frames = noise(encoder.spec)
    _, prefix = encoder.encode(frames, prefix_tokens=True)
    assert prefix.shape == (2, GRIDS[name][0], PREFIXES[name], 32)
    _, still_prefix = encoder.encode(frames[:, :1], prefix_tokens=True)
    assert still_prefix.shape == (2, PERIODS[name], PREFIXES[name], 32)


@every_encoder
@pytest.mark.parametrize("kind", ["video", "image"])
def test_tokens_have_the_steps_that_their_identity_says_are_stored(name, kind, toy, noise):
    encoder = toy(name)
    frames = noise(encoder.spec, num_frames=None if kind == "video" else 1)
    with_prefix_tokens = PREFIXES[name] > 0
    for grid in (None, (GRIDS[name][0], 2, 2), (4, 3, 2)):
        identity = feature_identity(
            encoder.spec,
            weights_sha256=encoder.weights_sha256,
            compute_dtype=encoder.compute_dtype,
            decode="frames/1",
            grid=grid,
            prefix_tokens=with_prefix_tokens,
        )
        tokens, prefix = encoder.encode_tokens(frames, grid=grid, prefix_tokens=with_prefix_tokens)
        stored = identity.grid_of(kind)
        assert tokens.shape == (2, *stored, 32)
        assert tokens.dtype == torch.float32
        if with_prefix_tokens:
            assert prefix.shape == (2, stored[0], identity.prefix_tokens, 32)


@every_encoder
def test_tokens_are_the_aligned_features(name, toy, noise):
    encoder = toy(name)
    frames, grid = noise(encoder.spec), (GRIDS[name][0], 2, 2)
    features, _ = encoder.encode(frames)
    assert torch.equal(encoder.encode_tokens(frames, grid=grid)[0], align(features, grid))


@every_encoder
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_neighbours_in_a_batch_of_one_shape(name, compute_dtype, toy, noise):
    encoder = toy(name, compute_dtype=compute_dtype)
    frames = noise(encoder.spec, batch=3)
    other = noise(encoder.spec, batch=3, seed=1)
    other[1] = frames[1]
    with_some, _ = encoder.encode(frames)
    with_others, _ = encoder.encode(other)
    assert torch.equal(with_some[1], with_others[1])
    assert not torch.equal(with_some[0], with_others[0])


@every_encoder
def test_the_same_seed_loads_the_same_encoder_and_another_seed_another(name, toy, spec_of, noise):
    frames = noise(spec_of(name))
    again = load_encoder(spec_of(name), "random:0")
    assert torch.equal(again.encode(frames)[0], toy(name).encode(frames)[0])
    assert again.weights_sha256 == toy(name).weights_sha256 != toy(name, "random:1").weights_sha256
    assert not torch.equal(again.encode(frames)[0], toy(name, "random:1").encode(frames)[0])


@every_encoder
def test_bfloat16_runs_in_bfloat16_and_stays_near_float32(name, toy, noise):
    precise, fast = toy(name), toy(name, compute_dtype="bfloat16")
    expected, _ = precise.encode(noise(precise.spec))
    features, _ = fast.encode(noise(precise.spec))
    assert features.dtype == torch.bfloat16
    assert fast.weights_sha256 == precise.weights_sha256
    cosine = torch.nn.functional.cosine_similarity(features.float(), expected, dim=-1)
    assert cosine.min() > 0.995
    assert not torch.equal(features.float(), expected)


@every_encoder
def test_safetensors_and_bin_of_the_same_weights_agree_in_hash_and_features(name, spec_of, checkpoint, noise):
    spec = spec_of(name)
    first = load_encoder(spec, str(checkpoint(spec, "safetensors")))
    second = load_encoder(spec, str(checkpoint(spec, "bin")))
    assert first.weights_label == second.weights_label == "pretrained"
    assert first.weights_sha256 == second.weights_sha256
    assert torch.equal(first.encode(noise(spec))[0], second.encode(noise(spec))[0])


@every_encoder
def test_a_checkpoint_that_lacks_a_used_weight_is_refused_by_its_name(name, spec_of, checkpoint, tmp_path):
    spec = spec_of(name)
    weights = load_file(checkpoint(spec) / "model.safetensors")
    ends = (".1.mlp.fc2.weight", ".1.output.dense.weight", ".1.mlp.down_proj.weight")  # of the second block
    victim = next(key for key in sorted(weights) if key.endswith(ends) and "text_model" not in key)
    save_file({key: value for key, value in weights.items() if key != victim}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint(spec) / "config.json").read_text())
    with pytest.raises(UserError, match=rf"weights of {name} in .* are incomplete: 1 missing"):
        load_encoder(spec, str(tmp_path))


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "pe"])  # timm's config.json has no such sizes
def test_a_checkpoint_of_another_architecture_is_refused_with_every_difference(name, spec_of, checkpoint):
    other_heads = spec_of(name).with_architecture({"num_heads": 8, "num_layers": 4})
    with pytest.raises(UserError, match=f"another architecture than {name}") as caught:
        load_encoder(other_heads, str(checkpoint(spec_of(name))))
    assert re.search("num_(attention_)?heads is 4 there, 8 here", str(caught.value))
    assert re.search("(num_hidden_layers|depth) is 3 there, 4 here", str(caught.value))


@every_encoder
def test_weights_of_blocks_that_are_not_run_do_not_matter(name, spec_of, checkpoint, tmp_path):
    spec = spec_of(name)
    weights = load_file(checkpoint(spec) / "model.safetensors")
    last_block = [key for key in weights if ".2." in key and "text_model" not in key]
    assert last_block
    (tmp_path / "config.json").write_text((checkpoint(spec) / "config.json").read_text())
    save_file({key: w + 1 if key in last_block else w for key, w in weights.items()}, tmp_path / "model.safetensors")
    same = load_encoder(spec, str(tmp_path)).weights_sha256 == load_encoder(spec, str(checkpoint(spec))).weights_sha256
    assert same == (spec.skipped_blocks == 1)


def test_normalisation_is_that_of_the_published_preprocessing(toy):
    """Independent of the network: read what it is given, against numpy in float64."""
    encoder = toy("dinov2")
    frames = np.random.default_rng(2).integers(0, 256, (1, 16, 32, 32, 3), dtype=np.uint8)
    seen = []
    hook = encoder.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder.encode(frames)
    hook.remove()
    expected = (frames / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(seen[0].numpy(), expected.transpose(0, 1, 4, 2, 3), rtol=0, atol=1e-6)


def test_numpy_that_cannot_be_written_and_torch_frames_give_the_same_features(toy, noise):
    encoder = toy("siglip")
    frames = noise(encoder.spec)
    expected, _ = encoder.encode(torch.from_numpy(frames.copy()))
    frames.setflags(write=False)
    assert torch.equal(encoder.encode(frames)[0], expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 16, 32, 32, 3), np.float32, r"wants uint8 frames \[batch, time, 32, 32, 3\], got float32"),
        ((1, 16, 3, 32, 32), np.uint8, r"got uint8 \[1, 16, 3, 32, 32\]"),
        ((16, 32, 32, 3), np.uint8, r"got uint8 \[16, 32, 32, 3\]"),
        ((1, 15, 32, 32, 3), np.uint8, "wants 16 frames of a video or 1 of a still, got 15"),
    ],
)
def test_frames_of_another_form_are_refused(toy, shape, dtype, message):
    with pytest.raises(UserError, match=message):
        toy("dinov2").encode(np.zeros(shape, dtype))


def test_an_unknown_compute_dtype_is_refused(spec_of):
    with pytest.raises(UserError, match="must be one of float32, bfloat16, got 'float16'"):
        load_encoder(spec_of("siglip"), "random:0", compute_dtype="float16")


def test_only_weights_that_are_used_are_loaded(toy, spec_of):
    cut, whole = toy("clip"), load_encoder(replace(spec_of("clip"), skipped_blocks=0), "random:0")
    block = 4 * (32 * 32 + 32) + 2 * (32 * 128) + 128 + 32 + 4 * 32  # attention, MLP, two norms
    sizes = [sum(p.numel() for p in encoder.network.parameters()) for encoder in (whole, cut)]
    assert sizes[0] - sizes[1] == block
