"""Tokens out of a store against an independent computation of them, written here from scratch.

Frames by PyAV in presentation order and the published expression for their indices, Pillow's and torch's resizing,
plain transformers models with `output_hidden_states` (LanguageBind, which transformers lacks: a slow float64 tower),
torch's adaptive pooling. Nothing of the decode, align and encode rooms takes part.
"""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from featurestore import FeatureStore
from pipeline.encoders import ENCODERS
from pipeline.encoders.network import build_network
from pipeline.encoders.weights import fill_weights, parse_weights
from tests.pipeline.conftest import Lab

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALVES = ([0.5] * 3, [0.5] * 3)
FRAMES = {"languagebind": 16, "dinov2": 16, "vivit": 32, "siglip": 16}
SIZE, PATCH, WIDTH, HEADS = 32, 8, 32, 2
GRID = (8, 3, 3)
# float16 keeps 11 bits; LanguageBind's resizing rounds bilinear ties to grey levels, where one unit in the last place
# of a weight makes one level in 255: its single tokens may be farther off, their mean may not.
LARGEST_ERROR = {"languagebind": 8e-3, "dinov2": 1.5e-3, "vivit": 1.5e-3, "siglip": 1.5e-3}
MEAN_ERROR = 1e-3


def frames_of(path, kind: str, count: int, samples: int = 32) -> list[Image.Image]:
    """The frames that an encoder with `count` frames sees in a model whose encoders see `samples` at most."""
    if kind == "image":
        return [Image.open(path).convert("RGB")] * count
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    number = len(frames)
    start, end = 0, number / fps
    indices = np.linspace(start * fps, max(0, min(number - 1, end * fps - 1)), samples, dtype=int)
    return [frames[i] for i in indices[:: samples // count]]


def squashed(frames: list[Image.Image], resampling, mean, std) -> torch.Tensor:
    """[T, C, H, W] in float64."""
    small = np.stack([np.asarray(frame.resize((SIZE, SIZE), resampling)) for frame in frames])
    return torch.from_numpy((small / 255 - mean) / std).permute(0, 3, 1, 2)


def centred(frames: list[Image.Image], mean, std, *, is_rounded: bool = True) -> torch.Tensor:
    """Short side to SIZE by bilinear interpolation without antialiasing, maybe rounded, then the centre."""
    width, height = frames[0].size
    wide = height <= width
    scaled = (SIZE, int(width / height * SIZE)) if wide else (int(height / width * SIZE), SIZE)
    video = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2).double()
    video = torch.nn.functional.interpolate(video, scaled, mode="bilinear", align_corners=False)
    video = video.round() if is_rounded else video
    top, left = round((scaled[0] - SIZE) / 2.0), round((scaled[1] - SIZE) / 2.0)
    cut = video[:, :, top : top + SIZE, left : left + SIZE] / 255
    return (cut - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def seeded_weights(lab, name: str) -> dict[str, torch.Tensor]:
    """What `random:0` is, by the names of the class that holds it."""
    network = build_network(ENCODERS[name].with_architecture(lab.settings()["architecture"][name]))
    fill_weights(network, parse_weights("random:0"))
    return {key.removeprefix("model."): weight for key, weight in network.state_dict().items()}


def plain_model(lab, name: str):
    """The published class at toy size, whole, holding the seeded weights."""
    common = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    if name == "dinov2":
        sizes = {"image_size": 5 * PATCH, "patch_size": PATCH, "mlp_ratio": 4, "layer_norm_eps": 1e-6}
        model = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**common, **sizes))
    elif name == "siglip":
        sizes = {"image_size": SIZE, "patch_size": PATCH, "intermediate_size": 4 * WIDTH, "layer_norm_eps": 1e-6}
        model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**common, **sizes, hidden_act="gelu_pytorch_tanh"))
    else:
        sizes = {"image_size": SIZE, "tubelet_size": [2, PATCH, PATCH], "intermediate_size": 4 * WIDTH}
        model = hf.VivitModel(hf.VivitConfig(**common, **sizes, num_frames=32, layer_norm_eps=1e-6))
    weights = seeded_weights(lab, name)
    unfit = model.load_state_dict(weights, strict=False)
    assert not unfit.unexpected_keys
    unused = ("layer.1.", "layers.1.", "head.", "post_layernorm", "layernorm.", "mask_token", "pooler.")
    used = () if name == "vivit" else unused
    assert all(any(part in key for part in used or ("pooler.",)) for key in unfit.missing_keys), unfit.missing_keys
    return model.eval().double()


def plain_features(name: str, model, frames, *, is_rounded: bool = True) -> torch.Tensor:
    """[T, H, W, D] on the encoder's own grid."""
    with torch.no_grad():
        if name == "dinov2":
            pixels = squashed(frames, Image.Resampling.BICUBIC, *IMAGENET)
            hidden = model(pixels, output_hidden_states=True).hidden_states[-2][:, 5:]
        elif name == "siglip":
            pixels = squashed(frames, Image.Resampling.BICUBIC, *HALVES)
            hidden = model(pixels, output_hidden_states=True).hidden_states[-2]
        elif name == "vivit":
            pixels = squashed(frames, Image.Resampling.BILINEAR, *HALVES)
            hidden = model(pixels[None]).last_hidden_state[:, 1:]
        else:
            pixels = centred(frames, *OPENAI, is_rounded=is_rounded)
            hidden = torch.cat([tower_on_eight(eight, model) for eight in pixels.split(8)])
    return hidden.reshape(-1, SIZE // PATCH, SIZE // PATCH, WIDTH)


def tower_on_eight(pixels_TCHW, weights) -> torch.Tensor:
    """LanguageBind's second to last block on eight frames, patches only: one block, attention in plain sums."""
    weights = {key.removeprefix("vision_model."): w.double() for key, w in weights.items()}
    patches = torch.nn.functional.conv2d(pixels_TCHW, weights["embeddings.patch_embedding.weight"], stride=PATCH)
    tokens = patches.flatten(2).transpose(1, 2)  # T P D
    first = weights["embeddings.class_embedding"].expand(len(tokens), 1, -1)
    hidden = torch.cat([first, tokens], 1) + weights["embeddings.position_embedding.weight"]
    hidden = normed(hidden, weights, "pre_layrnorm")
    block = {key.removeprefix("encoder.layers.0."): w for key, w in weights.items() if "layers.0." in key}
    track = hidden.transpose(0, 1) + block["temporal_embedding"]  # N T D
    track = track + attended(normed(track, block, "temporal_layer_norm1"), block, "temporal_attn")
    hidden = track.transpose(0, 1)
    hidden = hidden + attended(normed(hidden, block, "layer_norm1"), block, "self_attn")
    inner = dense(normed(hidden, block, "layer_norm2"), block, "mlp.fc1")
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return (hidden + dense(inner, block, "mlp.fc2"))[:, 1:]


def dense(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normed(x, weights, name):
    centred_x = x - x.mean(-1, keepdim=True)
    scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return centred_x / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attended(x_BLD, weights, name):
    heads = []
    query, key, value = (dense(x_BLD, weights, f"{name}.{part}_proj") for part in "qkv")
    for head in range(HEADS):
        columns = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / (WIDTH / HEADS) ** 0.5
        heads.append(scores.softmax(-1) @ value[..., columns])
    return dense(torch.cat(heads, -1), weights, f"{name}.out_proj")


def pooled(features_THWD: torch.Tensor) -> np.ndarray:
    tokens_DTHW = torch.nn.functional.adaptive_avg_pool3d(features_THWD.permute(3, 0, 1, 2), GRID)
    return tokens_DTHW.permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("name", FRAMES)
def test_stored_tokens_equal_an_independent_computation(name, extracted):
    store = FeatureStore.open(extracted.store)
    model = seeded_weights(extracted, name) if name == "languagebind" else plain_model(extracted, name)
    clips = store.clips.to_pylist()
    assert len(clips) == len(extracted.VIDEOS) + len(extracted.IMAGES)
    found = store.read([clip["clip_id"] for clip in clips], encoder=name)
    for clip, tokens in zip(clips, found, strict=True):
        frames = frames_of(extracted.root / clip["path"], clip["kind"], FRAMES[name])
        expected = pooled(plain_features(name, model, frames))
        assert expected.std() > 0.2
        error = np.abs(tokens - expected)
        assert error.mean() < MEAN_ERROR, clip["path"]
        assert error.max() < LARGEST_ERROR[name], clip["path"]


@pytest.fixture(scope="module")
def released(media_root, tmp_path_factory):
    """A store as released models with one encoder see frames, ViViT in its form of 8 steps, LanguageBind in float."""
    lab = Lab(media_root, tmp_path_factory.mktemp("released"))
    rules = dict.fromkeys(("languagebind", "dinov2", "siglip"), "linspace-16") | {"vivit": "linspace-32/1+steps/2"}
    lab.extract(frame_rule=rules, frame_dtype={"languagebind": "float32"})
    return lab


@pytest.mark.parametrize("name", FRAMES)
def test_tokens_of_the_frames_of_released_models_equal_an_independent_computation(name, released):
    store = FeatureStore.open(released.store)
    model = seeded_weights(released, name) if name == "languagebind" else plain_model(released, name)
    clips = store.clips.to_pylist()
    found = store.read([clip["clip_id"] for clip in clips], encoder=name)
    for clip, tokens in zip(clips, found, strict=True):
        frames = frames_of(released.root / clip["path"], clip["kind"], FRAMES[name], FRAMES[name])
        features = plain_features(name, model, frames, is_rounded=False)
        if name == "vivit":
            features = features[::2]
        expected = pooled(features)
        half_a_step = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float64) / 2
        assert (np.abs(tokens - expected) < half_a_step + 1e-4).all(), clip["path"]  # LanguageBind's too


def test_a_still_is_stored_for_one_period_and_read_as_if_its_copies_had_been_encoded(extracted):
    """The repeated tokens are right for a whole clip of copies: above, every still was computed with all frames."""
    import zarr  # another reader than ours

    store = FeatureStore.open(extracted.store)
    periods = {"languagebind": 4, "dinov2": 1, "vivit": 8, "siglip": 1}  # of 8 steps, each two of the encoder's own
    still = store.clips.filter(store.clips["kind"].to_numpy(zero_copy_only=False) == "image")["clip_id"][0].as_py()
    for name, period in periods.items():
        group = store.encoders[name].group_name
        assert zarr.open_array(extracted.store / "image" / group / "tokens", mode="r").shape[1] == period
        steps = store.read([still], encoder=name)[0]
        assert len(steps) == GRID[0]
        assert all(np.array_equal(steps[t], steps[t % period]) for t in range(GRID[0]))
