"""Numbers of the transformers families against a plain computation, loaded from checkpoints like the published ones.

The plain side shares nothing with ours: frames through Pillow and numpy, the whole published model with
`output_hidden_states`, torch's adaptive pooling.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mervcache.errors import UserError
from pipeline.encoders import load_encoder

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALVES = ([0.5] * 3, [0.5] * 3)


def plain_pixels(frames_THWC, mean, std):
    """Per frame: Pillow image, resize to the size it has, [0, 1], normalise; T C H W."""
    images = [Image.fromarray(frame).resize((32, 32), Image.Resampling.BICUBIC) for frame in frames_THWC]
    scaled = np.stack([np.asarray(image) for image in images]).astype(np.float64) / 255
    return torch.from_numpy((scaled - mean) / std).float().permute(0, 3, 1, 2)


def plain_features(name, model, frames_THWC):
    """[T, H, W, D] of one clip by the whole published model."""
    if name == "dinov2":
        hidden = model(plain_pixels(frames_THWC, *IMAGENET), output_hidden_states=True).hidden_states[-2][:, 5:]
    elif name == "depthanything":  # what the depth head reads, last of its four feature maps
        hidden = model.backbone(plain_pixels(frames_THWC, *IMAGENET)).feature_maps[-1][:, 1:]
    elif name == "dinov3":
        hidden = model(plain_pixels(frames_THWC, *IMAGENET)).last_hidden_state[:, 5:]
    elif name == "vjepa2":
        hidden = model(plain_pixels(frames_THWC, *IMAGENET)[None]).last_hidden_state
    elif name in ("siglip", "siglip2"):
        hidden = model.vision_model(plain_pixels(frames_THWC, *HALVES), output_hidden_states=True).hidden_states[-2]
    elif name == "clip":
        hidden = model.vision_model(plain_pixels(frames_THWC, *OPENAI), output_hidden_states=True).hidden_states[-2]
        hidden = hidden[:, 1:]
    elif name == "vivit":
        hidden = model.vivit(plain_pixels(frames_THWC, *HALVES)[None]).last_hidden_state[:, 1:]
    else:
        outputs = model(plain_pixels(frames_THWC, *IMAGENET)[None], output_hidden_states=True)
        hidden = outputs.hidden_states[-1]
    return hidden.reshape(-1, 4, 4, 32)


FAMILIES = ("dinov2", "siglip", "clip", "vivit", "videomae", "siglip2", "dinov3", "vjepa2", "depthanything")


@pytest.mark.parametrize("name", FAMILIES)
def test_features_and_tokens_equal_the_plain_published_model(name, spec_of, noise, checkpoint, published_model):
    spec = spec_of(name)
    encoder, frames = load_encoder(spec, str(checkpoint(spec))), noise(spec)
    with torch.no_grad():
        expected = torch.stack([plain_features(name, published_model(spec), clip) for clip in frames])
    features, _ = encoder.encode(frames)
    assert expected.std() > 0.3
    torch.testing.assert_close(features, expected, rtol=0, atol=5e-5)
    pooled = torch.nn.functional.adaptive_avg_pool2d(expected.flatten(0, 1).permute(0, 3, 1, 2), (3, 3))
    tokens, _ = encoder.encode_tokens(frames, grid=(spec.grid[0], 3, 3))
    torch.testing.assert_close(tokens, pooled.permute(0, 2, 3, 1).unflatten(0, (2, -1)), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("name", "count"), [("dinov2", 5), ("clip", 1), ("vivit", 1)])
def test_prefix_tokens_are_those_in_front_of_the_patches(name, count, spec_of, noise, checkpoint, published_model):
    spec = spec_of(name)
    frames, model = noise(spec, batch=1), published_model(spec)
    with torch.no_grad():
        if name == "vivit":
            expected = model.vivit(plain_pixels(frames[0], *HALVES)[None]).last_hidden_state[:, :1].expand(16, 1, 32)
        else:
            tower = model if name == "dinov2" else model.vision_model
            pixels = plain_pixels(frames[0], *(IMAGENET if name == "dinov2" else OPENAI))
            expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, :count]
    _, prefix = load_encoder(spec, str(checkpoint(spec))).encode(frames, prefix_tokens=True)
    torch.testing.assert_close(prefix[0], expected, rtol=0, atol=5e-5)


def test_dinov2_at_the_size_of_its_position_embeddings_needs_no_resampling(spec_of, noise, tmp_path):
    import transformers as hf

    spec = spec_of("dinov2").with_architecture({"position_grid": 4})
    config = hf.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    plain = hf.Dinov2WithRegistersModel(config).eval()
    plain.save_pretrained(tmp_path)
    frames = noise(spec, batch=1)
    with torch.no_grad():
        expected = plain_features("dinov2", plain, frames[0])
    features, _ = load_encoder(spec, str(tmp_path)).encode(frames)
    torch.testing.assert_close(features[0], expected, rtol=0, atol=1e-5)


def test_siglips_gelu_is_a_choice_and_the_exact_one_equals_a_model_with_it(spec_of, noise, checkpoint, published_model):
    from transformers import SiglipVisionModel

    spec = spec_of("siglip")
    exact = spec.with_architecture({"activation": "gelu"})
    frames, folder = noise(spec, batch=1), str(checkpoint(spec))
    plain = SiglipVisionModel.from_pretrained(folder).eval()
    for layer in plain.encoder.layers:
        layer.mlp.activation_fn = torch.nn.GELU(approximate="none")
    with torch.no_grad():
        expected = plain(plain_pixels(frames[0], *HALVES), output_hidden_states=True).hidden_states[-2]
    features, _ = load_encoder(exact, folder).encode(frames)
    torch.testing.assert_close(features[0].flatten(1, 2), expected, rtol=0, atol=5e-5)
    tanh, _ = load_encoder(spec, folder).encode(frames)
    assert 1e-5 < (tanh - features).abs().max() < 0.05


@pytest.mark.parametrize("name", ["clip", "videomae"])
def test_a_final_norm_that_a_family_does_not_have_is_refused(name, spec_of):
    with pytest.raises(UserError, match=f"{name} has no final norm"):
        load_encoder(replace(spec_of(name), final_norm=True), "random:0")


def test_other_blocks_and_the_final_norm_can_be_asked_for(spec_of, noise, checkpoint, published_model):
    spec = spec_of("dinov2")
    whole, frames = replace(spec, skipped_blocks=0, final_norm=True), noise(spec, batch=1)
    with torch.no_grad():
        expected = published_model(spec)(plain_pixels(frames[0], *IMAGENET)).last_hidden_state[:, 5:]
    features, _ = load_encoder(whole, str(checkpoint(spec))).encode(frames)
    torch.testing.assert_close(features[0].flatten(1, 2), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_hashed_names_are_those_of_the_published_checkpoint(name, spec_of, toy, checkpoint):
    """save_pretrained writes the published names, whatever the library calls its modules."""
    network = toy(name).network
    published = {
        re.sub(r"^(vision_model|vivit|videomae)\.", "", key)
        for key in load_file(checkpoint(spec_of(name)) / "model.safetensors")
    }
    assert {network.weight_name(key) for key in network.state_dict()} <= published
