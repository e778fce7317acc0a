"""The table of encoders: order, unknown names, and plug-ins through a real entry point."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mervcache.errors import UserError
from pipeline.encoders import ENCODERS, MERV_ENCODERS, encoder_spec, load_encoder
from pipeline.encoders.base import feature_identity
from pipeline.encoders.registry import EncoderTable

PLUG_IN = Path(__file__).with_name("vit_plugin.py")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(entry points, module text) -> a table that sees a distribution of that module on sys.path."""

    def make(entry_points: str, module: str = "", module_name: str = "vit_plugin"):
        (tmp_path / f"{module_name}.py").write_text(module)
        metadata = tmp_path / "merv_vit-0.1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: merv-vit\nVersion: 0.1\n")
        (metadata / "entry_points.txt").write_text(f"[merv.encoders]\n{entry_points}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module_name, raising=False)
        return EncoderTable({name: ENCODERS[name] for name in ("dinov2", "siglip")})

    return make


def test_the_four_of_merv_come_first_in_its_order():
    assert list(ENCODERS)[:4] == ["languagebind", "dinov2", "vivit", "siglip"]
    assert MERV_ENCODERS == ("languagebind", "dinov2", "vivit", "siglip")
    assert all(ENCODERS[name].name == name for name in MERV_ENCODERS)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        UserError,
        match="unknown encoder 'videoma', the nearest known one is 'videomae'; known: languagebind",
    ):
        encoder_spec("videoma")


def test_a_plug_in_of_under_40_lines_joins_as_an_encoder_like_the_others(install):
    assert len(PLUG_IN.read_text().splitlines()) < 40
    table = install("vit = vit_plugin:VIT", PLUG_IN.read_text())
    assert list(table) == ["dinov2", "siglip", "vit"]
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 3, "num_heads": 4}
    spec = encoder_spec("vit", table).with_architecture(sizes)
    encoder = load_encoder(spec, "random:0")
    frames = np.random.default_rng(0).integers(0, 256, (1, 16, 32, 32, 3), dtype=np.uint8)
    features, prefix = encoder.encode(frames, prefix_tokens=True)
    assert features.shape == (1, 16, 4, 4, 32)
    assert prefix.shape == (1, 16, 1, 32)
    dtype, sha256 = encoder.compute_dtype, encoder.weights_sha256
    identity = feature_identity(spec, weights_sha256=sha256, compute_dtype=dtype, decode="frames/1")
    assert identity.group_name.startswith("vit-")


def test_a_plug_in_reads_the_second_to_last_block_of_a_published_checkpoint(install, tmp_path):
    from transformers import ViTConfig, ViTModel

    table = install("vit = vit_plugin:VIT", PLUG_IN.read_text())
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 3, "num_heads": 4}
    spec = encoder_spec("vit", table).with_architecture(sizes)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
    )
    plain = ViTModel(config).eval()
    plain.save_pretrained(tmp_path / "weights")
    frames = np.random.default_rng(0).integers(0, 256, (1, 16, 32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy((frames[0] / 255.0 - 0.5) / 0.5).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = plain(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].reshape(1, 16, 4, 4, 32)
    features, _ = load_encoder(spec, str(tmp_path / "weights")).encode(frames)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_a_fresh_process_finds_an_installed_plug_in(install, tmp_path):
    install("vit = vit_plugin:VIT", PLUG_IN.read_text())
    program = (
        "import sys; from pipeline.encoders import ENCODERS; print('vit' in ENCODERS, 'vit_plugin' in sys.modules)"
    )
    program += "; print(ENCODERS['vit'].grid)"
    root = Path(__file__).resolve().parents[3]
    environment = {"PYTHONPATH": f"{tmp_path}:{root}", "PATH": ""}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert answer.stdout.split("\n")[:2] == ["True False", "(16, 14, 14)"]


def test_a_plug_in_that_fails_to_import_is_named_and_harms_nobody_else(install):
    table = install("broken = broken_plugin:SPEC", "import no_such_library", "broken_plugin")
    assert table["siglip"].name == "siglip"
    with pytest.raises(UserError, match=r"plug-in broken = broken_plugin:SPEC cannot be loaded: No module named 'no_s"):
        table["broken"]
    reasons = []
    assert [spec.name for spec in table.usable(reasons.append)] == ["dinov2", "siglip"]
    assert len(reasons) == 1
    assert "broken_plugin:SPEC cannot be loaded" in reasons[0]


def test_a_plug_in_must_be_a_spec_of_its_own_name(install):
    table = install("other = vit_plugin:VIT", PLUG_IN.read_text())
    with pytest.raises(UserError, match=r"must be EncoderSpec\(name='other', ...\), got EncoderSpec\(name='vit'"):
        table["other"]


def test_a_plug_in_cannot_take_a_name_that_is_taken(install):
    table = install("siglip = vit_plugin:VIT", PLUG_IN.read_text())
    with pytest.raises(UserError, match="'siglip' is defined more than once: built in, vit_plugin:VIT; uninstall"):
        table["siglip"]


@pytest.mark.parametrize(
    "builder", ["no_such_module:build", "pipeline.encoders.published:no_such", "pipeline.encoders.published"]
)
def test_a_builder_that_is_not_there_is_named(builder, spec_of):
    with pytest.raises(UserError, match=f"builder '{builder}' of clip is not a module:function"):
        load_encoder(replace(spec_of("clip"), builder=builder), "random:0")


def test_a_builder_must_return_a_network(spec_of):
    with pytest.raises(UserError, match="must return an EncoderNetwork, got <class 'dict'>"):
        load_encoder(replace(spec_of("clip"), builder="builtins:vars"), "random:0")
