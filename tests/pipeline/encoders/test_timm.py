"""`timm:NAME`: features against timm's own forward, frames against its data config, names, sizes and refusals."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from featurestore.layout import GROUP_NAME
from mervcache.errors import UserError
from pipeline.config import EncoderSettings, read_config
from pipeline.decode.resize import NativeFrame, resize
from pipeline.encoders import ENCODERS, encoder_spec, load_encoder
from pipeline.encoders.timm_models import import_timm

timm = import_timm()
VIT, DINO, SWIN = "test_vit.r160_in1k", "vit_small_patch14_dinov2.lvd142m", "swin_tiny_patch4_window7_224.ms_in1k"
CONVNETS = ("test_convnext.r160_in1k", "test_resnet.r160_in1k", "test_efficientnet.r160_in1k")


def busy_model(name, **options):
    """timm's own model with weights that hide nothing: no zero biases, unit norms or equal running means."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm.create_model(name, **options)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return model.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """published(name) -> timm's model and a folder laid out like its repository on the Hub."""
    made = {}

    def make(name):
        if name not in made:
            model, folder = busy_model(name), tmp_path_factory.mktemp("timm")
            timm.models.save_for_hf(model, folder, safe_serialization=True)
            made[name] = model, str(folder)
        return made[name]

    return make


def frames_for(spec, batch=1, seed=0):
    shape = (batch, spec.num_frames, spec.resize.size, spec.resize.size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plain_pixels(frames_THWC, mean, std):
    scaled = frames_THWC.astype(np.float64) / 255
    return torch.from_numpy((scaled - np.array(mean)) / np.array(std)).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", [VIT, "test_vit3.r160_in1k", *CONVNETS])
def test_features_equal_timms_own_forward(name, published):
    model, folder = published(name)
    spec = encoder_spec(f"timm.{name}").with_architecture({"num_frames": 2})
    frames, config = frames_for(spec), timm.get_pretrained_cfg(name)
    with torch.no_grad():
        expected = model.forward_features(plain_pixels(frames[0], config.mean, config.std))
    if expected.ndim == 4:
        expected, prefix = expected.permute(0, 2, 3, 1), None
    else:
        prefix, expected = expected[:, : model.num_prefix_tokens], expected[:, model.num_prefix_tokens :]
    features, own_prefix = load_encoder(spec, folder).encode(frames, prefix_tokens=True)
    assert features.shape == (1, 2, *spec.grid[1:], spec.width)
    assert expected.std() > 0.02
    torch.testing.assert_close(features[0].flatten(1, 2), expected.reshape(2, -1, spec.width), rtol=1e-5, atol=5e-5)
    if prefix is not None:
        torch.testing.assert_close(own_prefix[0], prefix, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (VIT, 96),
        pytest.param(DINO, 56, marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_dinov3.lvd1689m", 64, marks=pytest.mark.slow),
    ],
)
def test_other_image_sizes_resample_positions_as_timm_does(name, size, published):
    model, folder = published(name)
    spec = encoder_spec(f"timm.{name}").with_architecture({"num_frames": 1, "image_size": size})
    resized = timm.create_model(
        name, img_size=size, pretrained=True, pretrained_cfg_overlay={"file": f"{folder}/model.safetensors"}
    ).eval()
    frames = frames_for(spec)
    with torch.no_grad():
        expected = resized.forward_features(plain_pixels(frames[0], spec.mean, spec.std))[:, model.num_prefix_tokens :]
    encoder = load_encoder(spec, folder)
    features, _ = encoder.encode(frames)
    torch.testing.assert_close(features[0].flatten(1, 2), expected, rtol=1e-5, atol=5e-5)
    own_size = load_encoder(encoder_spec(f"timm.{name}"), folder)
    assert own_size.weights_sha256 == encoder.weights_sha256  # of the weights as published


@pytest.mark.slow
def test_a_feature_map_with_channels_last_is_read_as_rows_and_columns():
    spec = encoder_spec(f"timm.{SWIN}").with_architecture({"num_frames": 1})
    encoder, frames = load_encoder(spec, "random:0"), frames_for(spec)
    plain = timm.create_model(SWIN, num_classes=0).eval()
    plain.head = torch.nn.Identity()
    plain.load_state_dict({name.removeprefix("model."): w for name, w in encoder.network.state_dict().items()})
    with torch.no_grad():
        expected = plain.forward_features(plain_pixels(frames[0], spec.mean, spec.std))
    assert expected.shape == (1, 7, 7, 768)
    torch.testing.assert_close(encoder.encode(frames)[0][0], expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("shape", [(240, 320), (317, 161), (160, 160)])
def test_frames_follow_timms_data_config(shape):
    """Resize the short side to floor(size / crop_pct), cut the centre, by Pillow on the whole picture."""
    config, spec = timm.get_pretrained_cfg(VIT), encoder_spec(f"timm.{VIT}")
    assert (config.crop_pct, config.crop_mode, config.interpolation, spec.mean) == (
        0.95,
        "center",
        "bicubic",
        config.mean,
    )
    coarse = np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    frame = np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))
    size, short = config.input_size[1], math.floor(config.input_size[1] / config.crop_pct)
    height, width = (int(short * side / min(shape)) for side in shape)
    left, top = round((width - size) / 2), round((height - size) / 2)
    whole = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, top, left + size, top + size)))
    found = resize(NativeFrame(frame), spec.resize)
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 2  # the order of Pillow's two passes depends on the size of the result
    assert (difference > 1).mean() < 0.01
    assert spec.preprocessing()["crop_pct"] == 0.95
    squashed = np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))
    assert np.array_equal(resize(NativeFrame(frame), spec.with_crop("squash").resize), squashed)


def test_names_are_legal_in_stores_and_settings_come_back_from_an_identity():
    given = {"dataset": "demo", "encoders": f"timm:{VIT},dinov2", "weights": {f"timm:{VIT}": "random:3"}}
    config = read_config(None, given | {"architecture": {f"timm:{VIT}": {"image_size": 96}}})
    assert config.encoders == (f"timm.{VIT}", "dinov2")
    settings, other = config.encoder_settings
    assert (settings.weights, other.weights) == ("random:3", "hub")
    identity = settings.identity("a" * 64)
    assert identity.encoder == f"timm.{VIT}"
    assert GROUP_NAME.fullmatch(identity.group_name)
    assert identity.layer == "output of block 6 of 6, then the final norm"
    assert EncoderSettings.of_identity(identity, "hub").identity("a" * 64) == identity
    for name in timm.list_pretrained():
        assert GROUP_NAME.fullmatch(f"timm.{name}-{'0' * 12}")
    assert not any(name.startswith("timm.") for name in ENCODERS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch14_dinov2", "has no model 'vit_smal_patch14_dinov2'; near it: .*vit_small_patch14_dinov2"),
        ("vit_small_patch14_dinov2.lvd142", "unknown weights of timm model .*lvd142m"),
        ("inception_v3", "is not a whole number of pixels"),
    ],
)
def test_models_that_cannot_be_used_are_refused_with_a_reason(name, message):
    with pytest.raises(UserError, match=message):
        read_config(None, {"dataset": "demo", "encoders": f"timm:{name}"})


def test_sizes_of_the_named_model_are_its_own(tmp_path):
    spec = encoder_spec(f"timm.{VIT}")
    with pytest.raises(UserError, match=r"num_layers=3, there 6.*set image_size or num_frames only"):
        load_encoder(spec.with_architecture({"num_layers": 3}), "random:0")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit2"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="architecture is 'test_vit2' there, 'test_vit' here"):
        load_encoder(spec, str(tmp_path))


def test_weights_that_are_missing_are_refused(published, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = published(VIT)
    weights = load_file(f"{folder}/model.safetensors")
    del weights["blocks.1.norm1.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_features": 64}))
    with pytest.raises(UserError, match=r"incomplete: 1 missing, blocks\.1\.norm1\.weight first"):
        load_encoder(encoder_spec(f"timm.{VIT}"), str(tmp_path))


@pytest.mark.slow
def test_importing_timm_leaves_no_torchvision_behind_and_the_table_imports_neither():
    code = (
        "import sys, pipeline.encoders; assert not {'torch', 'timm'} & sys.modules.keys()\n"
        "from importlib.util import find_spec; had = find_spec('torchvision') is not None\n"
        "from pipeline.encoders.timm_models import import_timm; timm = import_timm()\n"
        "assert had or 'torchvision' not in sys.modules\n"
        "assert timm.create_model('test_convnext').eval() and (find_spec('torchvision') is not None) == had"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
