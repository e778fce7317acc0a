from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mervcache.errors import UserError
from trainer.cli import resolve_stages
from trainer.config import HEADS, ProjectorConfig
from trainer.data.tokens import PrefixedTokens, TokenShape
from trainer.model.projectors import Moments, Projector, build_projectors
from trainer.recipes import get_stages


def shape(grid, width, is_pooled=True, num_prefix=0):
    return TokenShape(grid=grid, width=width, is_pooled=is_pooled, identity="test", num_prefix=num_prefix)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_tokens_become_embeddings_in_time_row_column_order(head, has_norm):
    projector = Projector(ProjectorConfig(head=head, pre_layer_norm=has_norm), shape((2, 3, 4), 5), 7)
    tokens_BTHWD = torch.randn(2, 2, 3, 4, 5)
    embeddings_BNM = projector(tokens_BTHWD)
    assert embeddings_BNM.shape == (2, 24, 7) == (2, projector.num_tokens, 7)
    token_D = tokens_BTHWD[1, 1, 2, 3]
    alone_M = projector.head(F.layer_norm(token_D, (5,)) if has_norm else token_D)
    torch.testing.assert_close(embeddings_BNM[1, 1 * 12 + 2 * 4 + 3], alone_M)


def test_stored_half_floats_are_read_as_they_are():
    projector = Projector(ProjectorConfig(), shape((1, 2, 2), 4), 3)
    tokens_BTHWD = torch.randn(1, 1, 2, 2, 4).half()
    torch.testing.assert_close(projector(tokens_BTHWD), projector(tokens_BTHWD.float()), rtol=0, atol=0)


def test_equal_grids_are_left_alone():
    projector = Projector(ProjectorConfig(grid=(2, 8, 8)), shape((2, 8, 8), 4), 3)
    tokens_BTHWD = torch.randn(1, 2, 8, 8, 4)
    assert projector.resample(tokens_BTHWD) is tokens_BTHWD


def test_nested_windows_are_plain_means():
    projector = Projector(ProjectorConfig(grid=(2, 1, 2)), shape((4, 2, 4), 3), 3)
    tokens_BTHWD = torch.randn(2, 4, 2, 4, 3)
    expected = tokens_BTHWD.reshape(2, 2, 2, 1, 2, 2, 2, 3).mean((2, 4, 6))
    torch.testing.assert_close(projector.resample(tokens_BTHWD), expected)


def test_a_raw_grid_of_14_is_averaged_over_torch_windows():
    projector = Projector(ProjectorConfig(grid=(1, 8, 8)), shape((1, 14, 14), 2, is_pooled=False), 3)
    tokens_BTHWD = torch.randn(1, 1, 14, 14, 2)
    expected = F.adaptive_avg_pool2d(tokens_BTHWD[:, 0].permute(0, 3, 1, 2), 8).permute(0, 2, 3, 1)[:, None]
    torch.testing.assert_close(projector.resample(tokens_BTHWD), expected)


def test_pooling_commutes_with_the_linear_head():
    pooled = Projector(ProjectorConfig(grid=(2, 2, 2)), shape((4, 4, 4), 6), 5)
    tokens_BTHWD = torch.randn(2, 4, 4, 4, 6)
    after = pooled.resampler(pooled.head(tokens_BTHWD)).flatten(1, 3)
    torch.testing.assert_close(pooled(tokens_BTHWD), after)


def test_pooled_grids_that_do_not_nest_are_refused():
    with pytest.raises(UserError, match=r"1x3x8 is not exact from the stored grid 1x8x8.*--grid raw"):
        Projector(ProjectorConfig(grid=(1, 3, 8)), shape((1, 8, 8), 2), 3)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize("native", [14, 16])
def test_a_pooled_grid_is_pooled_again_only_where_that_is_the_average_of_the_encoders_grid(native, side):
    def average(tokens_BTHWD, size):
        return F.adaptive_avg_pool2d(tokens_BTHWD[:, 0].permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)[:, None]

    native_BTHWD = torch.randn(2, 1, native, native, 3)
    stored_BTHWD, direct_BTHWD = average(native_BTHWD, 8), average(native_BTHWD, side)
    stored = replace(shape((1, 8, 8), 3), native_grid=(1, native, native))
    config = ProjectorConfig(grid=(1, side, side))
    if native == 16 or side == 8:
        torch.testing.assert_close(Projector(config, stored, 5).resample(stored_BTHWD), direct_BTHWD)
    else:
        assert (average(stored_BTHWD, side) - direct_BTHWD).abs().max() > 0.01
        with pytest.raises(UserError, match=rf"1x{side}x{side} is not exact.*1x14x14"):
            Projector(config, stored, 5)


@pytest.mark.parametrize("side", [8, 14, 16, 24])
def test_a_named_projector_upsamples_a_raw_grid_over_torch_windows(side):
    """256 tokens per frame of ViViT and SigLIP: the released code has AdaptiveAvgPool2d(16) on their 14 x 14."""
    config = ProjectorConfig(resampler="average_upsampled", grid=(2, side, side))
    projector = Projector(config, shape((2, 14, 14), 3, is_pooled=False), 5)
    tokens_BTHWD = torch.randn(2, 2, 14, 14, 3)
    expected = F.adaptive_avg_pool2d(tokens_BTHWD.flatten(0, 1).permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
    torch.testing.assert_close(projector.resample(tokens_BTHWD).flatten(0, 1), expected)
    assert projector(tokens_BTHWD).shape == (2, 2 * side * side, 5)
    if side == 16:  # by hand: window 1 begins at floor(14 / 16) = 0 and ends before ceil(2 * 14 / 16) = 2
        torch.testing.assert_close(projector.resample(tokens_BTHWD)[:, :, 1, 0], tokens_BTHWD[:, :, :2, 0].mean(2))


@pytest.mark.parametrize(
    ("grid", "stored", "message"),
    [
        ((1, 16, 16), shape((1, 14, 14), 2), "finer than the stored grid 1x14x14"),  # what was pooled already
        ((1, 3, 8), shape((1, 8, 8), 2), "1x3x8 is not exact from the stored grid 1x8x8"),
        ((4, 16, 16), shape((2, 14, 14), 2, is_pooled=False), "4x16x16 is finer than the stored grid 2x14x14"),
    ],
)
def test_upsampling_adds_no_time_steps_and_repeats_no_pooling(grid, stored, message):
    with pytest.raises(UserError, match=message):
        Projector(ProjectorConfig(resampler="average_upsampled", grid=grid), stored, 3)


def test_no_other_projector_upsamples_and_the_error_names_the_one_that_does():
    raw = shape((1, 14, 14), 2, is_pooled=False)
    with pytest.raises(UserError, match=r"1x16x16 is finer than the stored grid 1x14x14.*2d-average-upsampled"):
        Projector(ProjectorConfig(grid=(1, 16, 16)), raw, 3)


def test_a_source_may_give_more_than_a_resampler_reads():
    projector = Projector(ProjectorConfig(), shape((1, 2, 2), 4), 3)
    tokens_BTHWD = torch.randn(1, 1, 2, 2, 4)
    both = PrefixedTokens(tokens_BTHWD=tokens_BTHWD, prefix_BTKD=torch.randn(1, 1, 1, 4))
    assert torch.equal(projector(both), projector(tokens_BTHWD))


def test_an_error_names_its_encoder():
    stored = {
        "dinov2": shape((4, 8, 8), 16, num_prefix=5),
        "siglip": shape((4, 8, 8), 16),
    }
    with pytest.raises(UserError, match=r"siglip: no class token is stored of it.*if it has none, as SigLIP"):
        build_projectors(ProjectorConfig(resampler="class_token"), stored, 12)
    with pytest.raises(UserError, match=r"dinov2: projector 2d-attention reads the encoder's own grid"):
        build_projectors(ProjectorConfig(resampler="attention"), stored, 12)


def test_encoders_of_unlike_grids_cannot_be_fused():
    stored = {
        "dinov2": shape((2, 16, 16), 16, is_pooled=False, num_prefix=5),
        "vivit": shape((2, 14, 14), 16, is_pooled=False, num_prefix=1),
    }
    with pytest.raises(UserError, match=r"got dinov2 2x257x1, vivit 2x197x1; set encoders to those that share one"):
        build_projectors(ProjectorConfig(resampler="all_tokens"), stored, 12)
    with pytest.raises(UserError, match=r"got dinov2 2x16x16, vivit 2x14x14; set projector.grid to one they share"):
        build_projectors(ProjectorConfig(), stored, 12)
    built = build_projectors(ProjectorConfig(resampler="attention"), stored, 12)
    assert {projector.num_tokens for projector in built.values()} == {128}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_divisor": 0}, "at least 1"),
        ({"grid": (0, 8, 8)}, "at least 1"),
        ({"resampler": "attention", "frame_divisor": 2}, "keeps every time step.*average and convolution_3d can merge"),
        (
            {"grid": (4, 4, 4), "frame_divisor": 2},
            r"frame_divisor 2 decides the grid.*\[4, 4, 4\] too; set it to null",
        ),
        ({"resampler": "class_token", "grid": (4, 1, 1)}, "resampler class_token decides the grid"),
        ({"resampler": "all_tokens", "grid": (4, 4, 4)}, "resampler all_tokens decides the grid"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ProjectorConfig(**settings)


def chosen(row, config_file=None):
    """What `merv-train --recipe demo --projector ROW` trains."""
    (stage,) = resolve_stages(get_stages("demo"), config_file, {"projector": row})
    return stage.config.projector


def test_a_row_by_name_takes_the_recipe_s_grid_where_it_can(tmp_path):
    assert chosen("2d-attention").grid == get_stages("demo")[0].config.projector.grid == (4, 4, 4)
    for row in ("3d-average", "class-token", "all-tokens"):
        assert chosen(row).grid is None
    (tmp_path / "grid.yaml").write_text("projector: {grid: [2, 2, 2]}\n")
    with pytest.raises(UserError, match="frame_divisor 2 decides the grid"):
        chosen("3d-average", tmp_path / "grid.yaml")


@pytest.mark.parametrize("resampler", ["average", "convolution_3d"])
def test_what_enters_the_first_trained_layer_has_mean_zero_and_deviation_one(resampler):
    config = ProjectorConfig(resampler=resampler, grid=(1, 2, 2), standardise=True)
    projector = Projector(config, shape((2, 2, 2), 3, is_pooled=False), 3)
    tokens_BTHWD = torch.randn(50, 2, 2, 2, 3) * torch.tensor([1.0, 30.0, 0.01]) + torch.tensor([100.0, -3.0, 0.5])
    before = projector(tokens_BTHWD)
    moments = Moments()
    for part in tokens_BTHWD.split(16):
        moments.add(projector.resample(part))
    projector.standardise.fit(moments)
    found = projector.standardise(projector.resample(tokens_BTHWD)).flatten(0, 3)
    assert found.mean(0).abs().max() < 1e-3
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(3), rtol=1e-3, atol=0)
    by_hand = (tokens_BTHWD - projector.standardise.mean_D) / projector.standardise.std_D
    plain = Projector(replace(config, standardise=False), shape((2, 2, 2), 3, is_pooled=False), 3)
    plain.load_state_dict({k: v for k, v in projector.state_dict().items() if not k.startswith("standardise")})
    torch.testing.assert_close(projector(tokens_BTHWD), plain(by_hand), rtol=1e-3, atol=1e-3)
    assert (projector(tokens_BTHWD) - before).abs().max() > 1


def test_a_constant_channel_does_not_become_infinite():
    projector = Projector(ProjectorConfig(standardise=True), shape((1, 1, 1), 2), 3)
    moments = Moments()
    moments.add(torch.ones(4, 1, 1, 1, 2))
    projector.standardise.fit(moments)
    assert projector.standardise(torch.ones(1, 1, 1, 1, 2)).abs().max() == 0
