import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from featurestore.errors import UserError
from trainer.config import PROJECTORS, ProjectorConfig
from trainer.projectors import Projector
from trainer.standardise import Moments
from trainer.tokens import TokenShape

WIDTHS = (1024, 1024, 768, 768)  # LanguageBind, DINOv2, ViViT, SigLIP


def shape(grid, width, is_pooled=True):
    return TokenShape(grid=grid, width=width, is_pooled=is_pooled, identity="test")


def projectors_at_real_size(config):
    with torch.device("meta"):
        return [Projector(config, shape((16, 8, 8), width), 4096) for width in WIDTHS]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linear", 14_696_448),  # 4096 x (1024 + 1024 + 768 + 768) weights, 4 x 4096 biases
        ("linear-ln", 14_696_448 + 2 * sum(WIDTHS)),
        ("gelu-mlp", 14_696_448 + 4 * (4096 * 4096 + 4096)),
        (
            "fused-gelu-mlp",
            sum(w * 4 * w + 4 * w + 4 * w * 4096 + 4096 + 4096 * 4096 + 4096 for w in WIDTHS),
        ),
    ],
)
def test_parameters_at_the_real_size(name, parameters):
    found = projectors_at_real_size(PROJECTORS[name])
    assert sum(p.numel() for projector in found for p in projector.parameters()) == parameters


def test_multiply_adds_of_the_paper_projectors_at_the_real_size():
    with FlopCounterMode(display=False) as counter:
        for projector, width in zip(projectors_at_real_size(PROJECTORS["linear"]), WIDTHS, strict=True):
            projector(torch.empty(1, 16, 8, 8, width, device="meta"))
    assert counter.get_total_flops() == 2 * 1024 * 4096 * sum(WIDTHS)  # 0.015 T multiply-adds


@pytest.mark.parametrize("name", PROJECTORS)
def test_tokens_become_embeddings_in_time_row_column_order(name):
    projector = Projector(PROJECTORS[name], shape((2, 3, 4), 5), 7)
    tokens_BTHWD = torch.randn(2, 2, 3, 4, 5, dtype=torch.float32)
    embeddings_BNM = projector(tokens_BTHWD)
    assert embeddings_BNM.shape == (2, 24, 7) == (2, projector.num_tokens, 7)
    alone = projector.head(
        tokens_BTHWD[1, 1, 2, 3] if projector.norm is None else projector.norm(tokens_BTHWD)[1, 1, 2, 3]
    )
    torch.testing.assert_close(embeddings_BNM[1, 1 * 12 + 2 * 4 + 3], alone)


def test_stored_half_floats_are_read_as_they_are():
    projector = Projector(ProjectorConfig(), shape((1, 2, 2), 4), 3)
    tokens_BTHWD = torch.randn(1, 1, 2, 2, 4).half()
    torch.testing.assert_close(projector(tokens_BTHWD), projector(tokens_BTHWD.float()), rtol=0, atol=0)


def test_equal_grids_are_left_alone():
    projector = Projector(ProjectorConfig(grid=(2, 8, 8)), shape((2, 8, 8), 4), 3)
    tokens_BTHWD = torch.randn(1, 2, 8, 8, 4)
    assert projector.resampler(tokens_BTHWD) is tokens_BTHWD


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
    with pytest.raises(UserError, match="1x3x8 does not nest in the stored grid 1x8x8"):
        Projector(ProjectorConfig(grid=(1, 3, 8)), shape((1, 8, 8), 2), 3)


def test_a_grid_finer_than_the_store_is_refused():
    with pytest.raises(UserError, match="16x8x8 is finer than the stored grid 16x4x4"):
        Projector(ProjectorConfig(grid=(16, 8, 8)), shape((16, 4, 4), 2, is_pooled=False), 3)


def test_standardised_channels_have_mean_zero_and_deviation_one():
    projector = Projector(ProjectorConfig(standardise=True), shape((2, 2, 2), 3), 3)
    tokens_BTHWD = torch.randn(50, 2, 2, 2, 3) * torch.tensor([1.0, 30.0, 0.01]) + torch.tensor([100.0, -3.0, 0.5])
    moments = Moments()
    for part in tokens_BTHWD.split(16):
        moments.add(part)
    projector.standardise.fit(moments)
    found = projector.standardise(tokens_BTHWD).flatten(0, 3)
    assert found.mean(0).abs().max() < 1e-3
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(3), rtol=1e-3, atol=0)


def test_a_constant_channel_does_not_become_infinite():
    projector = Projector(ProjectorConfig(standardise=True), shape((1, 1, 1), 2), 3)
    moments = Moments()
    moments.add(torch.ones(4, 1, 1, 1, 2))
    projector.standardise.fit(moments)
    assert projector.standardise(torch.ones(1, 1, 1, 1, 2)).abs().max() == 0
