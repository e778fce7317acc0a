from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mervcache.errors import UserError
from trainer.config import HEADS, PROJECTORS, RESAMPLERS, ProjectorConfig, import_choice
from trainer.data.tokens import PrefixedTokens, TokenShape
from trainer.model.projectors import Projector, average_windows

RAW = TokenShape(grid=(4, 9, 9), width=16, is_pooled=False, identity="test", num_prefix=3)
POOLED = replace(RAW, grid=(4, 8, 8), is_pooled=True)
LLM_WIDTH = 12
NUM_TOKENS = {
    "2d-average": 4 * 9 * 9,
    "2d-average-upsampled": 4 * 9 * 9,
    "2d-attention": 4 * 64,
    "2d-convolution": 4 * 64,
    "3d-average": 2 * 9 * 9,
    "3d-convolution": 4 * 64,
    "class-token": 4,
    "all-tokens": 4 * (1 + 9 * 9),
}


def resampler(name, *, grid=None, frame_divisor=1, stored=RAW):
    """With weights that are large enough for every one to matter."""
    torch.manual_seed(1)
    built = import_choice(RESAMPLERS, name)(
        ProjectorConfig(resampler=name, grid=grid, frame_divisor=frame_divisor), stored, LLM_WIDTH
    )
    return randomised(built)


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def tokens_of(stored, batch=2):
    random = torch.Generator().manual_seed(2)
    return torch.randn(batch, *stored.grid, stored.width, generator=random)


def prefixed(stored, batch=2):
    random = torch.Generator().manual_seed(3)
    prefix_BTKD = torch.randn(batch, stored.grid[0], stored.num_prefix, stored.width, generator=random)
    return PrefixedTokens(tokens_BTHWD=tokens_of(stored, batch), prefix_BTKD=prefix_BTKD)


def given_to(name, stored=RAW):
    return prefixed(stored) if "prefix" in import_choice(RESAMPLERS, name).reads else tokens_of(stored)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("row", PROJECTORS)
def test_every_row_of_the_ablation_with_every_head(row, head):
    config = replace(PROJECTORS[row], head=head, pre_layer_norm=True, standardise=True)
    projector = randomised(Projector(config, RAW, LLM_WIDTH))
    halves = prefixed(RAW)
    halves = PrefixedTokens(tokens_BTHWD=halves.tokens_BTHWD.half(), prefix_BTKD=halves.prefix_BTKD.half())
    embeddings_BNM = projector(halves)
    assert embeddings_BNM.shape == (2, NUM_TOKENS[row], LLM_WIDTH) == (2, projector.num_tokens, LLM_WIDTH)
    assert embeddings_BNM.dtype == torch.float32
    singles = PrefixedTokens(tokens_BTHWD=halves.tokens_BTHWD.float(), prefix_BTKD=halves.prefix_BTKD.float())
    torch.testing.assert_close(embeddings_BNM, projector(singles), rtol=0, atol=0)
    (embeddings_BNM * torch.randn(embeddings_BNM.shape)).sum().backward()
    gradients = {name: parameter.grad.abs().max() for name, parameter in projector.named_parameters()}
    for name, gradient in gradients.items():  # what cancels leaves 1e-8 of the largest, by rounding
        assert gradient > 1e-5 * max(gradients.values()), f"{name} cannot change the output"


@pytest.mark.parametrize("row", PROJECTORS)
def test_stored_halves_pass_through_bfloat16_arithmetic(row):
    torch.manual_seed(6)
    projector = Projector(PROJECTORS[row], RAW, LLM_WIDTH)
    tokens = prefixed(RAW)
    exact_BNM = projector(tokens)
    halves = PrefixedTokens(tokens_BTHWD=tokens.tokens_BTHWD.half(), prefix_BTKD=tokens.prefix_BTKD.half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_BNM = projector(halves)
    assert (found_BNM.float() - exact_BNM).norm() < 0.03 * exact_BNM.norm()


@pytest.mark.parametrize("name", RESAMPLERS)
def test_clips_do_not_see_each_other(name):
    module = resampler(name)
    together = module(given_to(name))
    assert together.shape == (2, *module.grid, module.width)
    tokens = given_to(name)
    if isinstance(tokens, PrefixedTokens):
        alone = PrefixedTokens(tokens_BTHWD=tokens.tokens_BTHWD[1:], prefix_BTKD=tokens.prefix_BTKD[1:])
    else:
        alone = tokens[1:]
    torch.testing.assert_close(together[1:], module(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reach"), [("average", 0), ("attention", 0), ("convolution", 0), ("convolution_3d", 1)]
)
def test_only_the_3d_convolution_looks_at_other_frames(name, reach):
    module = resampler(name)
    tokens_BTHWD = tokens_of(RAW)
    changed_BTHWD = tokens_BTHWD.clone()
    changed_BTHWD[:, 3] += torch.randn(2, 9, 9, 16)
    moved_T = (module(changed_BTHWD) - module(tokens_BTHWD)).abs().amax((0, 2, 3, 4)) > 1e-3
    assert moved_T.tolist() == [frame >= 3 - reach for frame in range(4)]


def window_means(tokens_BTHWD, grid):
    """Window by window: floor of the start, ceiling of the end."""
    out_BTHWD = tokens_BTHWD.new_empty(len(tokens_BTHWD), *grid, tokens_BTHWD.shape[-1])
    for place in product(*map(range, grid)):
        cut = [
            slice(i * have // want, -(-(i + 1) * have // want))
            for i, have, want in zip(place, tokens_BTHWD.shape[1:4], grid, strict=True)
        ]
        out_BTHWD[(slice(None), *place)] = tokens_BTHWD[(slice(None), *cut)].mean((1, 2, 3))
    return out_BTHWD


@pytest.mark.parametrize("grid", [(4, 8, 8), (2, 8, 8), (2, 3, 9), (1, 1, 1)])
def test_averages_are_means_over_windows(grid):
    tokens_BTHWD = tokens_of(RAW)
    torch.testing.assert_close(resampler("average", grid=grid)(tokens_BTHWD), window_means(tokens_BTHWD, grid))
    assert average_windows(tokens_BTHWD, RAW.grid) is tokens_BTHWD


def test_3d_average_merges_frames_and_keeps_places():
    tokens_BTHWD = tokens_of(POOLED)
    averaged_BTHWD = resampler("average", frame_divisor=2, stored=POOLED)(tokens_BTHWD)
    torch.testing.assert_close(averaged_BTHWD, (tokens_BTHWD[:, 0::2] + tokens_BTHWD[:, 1::2]) / 2)


def layer_norm(values, layer, axis=-1):
    centred = values - values.mean(axis, keepdim=True)
    scaled = centred / (centred.square().mean(axis, keepdim=True) + 1e-5).sqrt()
    shape = [-1 if each == axis % values.ndim else 1 for each in range(values.ndim)]
    return scaled * layer.weight.view(shape) + layer.bias.view(shape)


def test_attention_is_torch_multi_head_attention_whatever_the_bias_of_its_keys():
    module = resampler("attention")
    tokens_BTHWD = tokens_of(RAW)
    normed_PXD = layer_norm(tokens_BTHWD.reshape(8, 81, 16), module.token_norm).transpose(0, 1)
    query_QXD = module.query_QD[:, None].expand(64, 8, 16)
    attended_QXD, _ = F.multi_head_attention_forward(
        query_QXD,
        normed_PXD,
        normed_PXD,
        embed_dim_to_check=16,
        num_heads=8,
        in_proj_weight=torch.cat([module.query.weight, module.key.weight, module.value.weight]),
        in_proj_bias=torch.cat([module.query.bias, torch.randn(16), module.value.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=module.out.weight,
        out_proj_bias=module.out.bias,
        need_weights=False,
    )
    query_QXD = query_QXD + attended_QXD
    first, _, second = module.mlp
    hidden = layer_norm(query_QXD, module.query_norm) @ first.weight.T + first.bias
    query_QXD = query_QXD + F.gelu(hidden) @ second.weight.T + second.bias
    torch.testing.assert_close(module(tokens_BTHWD).reshape(8, 64, 16), query_QXD.transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_attention_starts_as_the_attentive_pooler_does_head_included():
    torch.manual_seed(4)
    stored = replace(RAW, width=64)
    projector = Projector(ProjectorConfig(resampler="attention", head="gelu-mlp"), stored, 64)
    module = projector.resampler
    branch_ends = {id(module.out), id(module.mlp[-1])}
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            wanted = 0.02 / 2**0.5 if id(layer) in branch_ends else 0.02
            assert layer.weight.std().item() == pytest.approx(wanted, rel=0.05)
            assert layer.bias is None or not layer.bias.any()
    assert module.query_QD.std().item() == pytest.approx(0.02, rel=0.05)


def by_pixel(values_XCHW, linear):
    """A linear layer over channels, as the 1 x 1 convolution it stands for."""
    return F.conv2d(values_XCHW, linear.weight[:, :, None, None], linear.bias)


def reg_block(values_XCHW, block):
    """Channels first, one convolution after the other, the depth-wise one channel by channel."""
    mixed = F.silu(layer_norm(by_pixel(values_XCHW, block.first[0]), block.first[1], axis=1))
    kernels = block.depthwise.weight
    channels = [F.conv2d(mixed[:, c : c + 1], kernels[c : c + 1], padding=1) for c in range(len(kernels))]
    mixed = F.silu(layer_norm(torch.cat(channels, 1), block.depthwise_norm, axis=1))
    squeezed = F.silu(by_pixel(mixed.mean((2, 3), keepdim=True), block.squeeze))
    mixed = mixed * torch.sigmoid(by_pixel(squeezed, block.excite))
    mixed = layer_norm(by_pixel(mixed, block.last[0]), block.last[1], axis=1)
    if isinstance(block.shortcut, nn.Identity):
        return F.silu(mixed + values_XCHW)
    return F.silu(mixed + layer_norm(by_pixel(values_XCHW, block.shortcut[0]), block.shortcut[1], axis=1))


def test_the_convolution_is_the_c_abstractor_block_by_block():
    module = resampler("convolution")
    tokens_BTHWD = tokens_of(RAW)
    values_XCHW = tokens_BTHWD.reshape(8, 9, 9, 16).permute(0, 3, 1, 2)
    assert (len(module.before), len(module.behind)) == (3, 3)
    assert [block.squeeze.out_features for block in module.before] == [4, 3, 3]  # a quarter of what comes in
    for block in module.before:
        values_XCHW = reg_block(values_XCHW, block)
    values_XCHW = window_means(values_XCHW.permute(0, 2, 3, 1)[:, None], (1, 8, 8))[:, 0].permute(0, 3, 1, 2)
    for block in module.behind:
        values_XCHW = reg_block(values_XCHW, block)
    expected = values_XCHW.permute(0, 2, 3, 1).reshape(2, 4, 8, 8, LLM_WIDTH)
    torch.testing.assert_close(module(tokens_BTHWD), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frame_divisor", [1, 2])
def test_the_3d_convolution_sums_27_shifts_and_pools_afterwards(frame_divisor):
    module = resampler("convolution_3d", frame_divisor=frame_divisor)
    tokens_BTHWD = tokens_of(RAW)
    padded_BTHWD = F.pad(tokens_BTHWD, (0, 0, 1, 1, 1, 1, 1, 1))
    summed_BTHWM = module.convolution.bias.expand(2, 4, 9, 9, LLM_WIDTH)
    for t, h, w in product(range(3), repeat=3):
        shifted_BTHWD = padded_BTHWD[:, t : t + 4, h : h + 9, w : w + 9]
        summed_BTHWM = summed_BTHWM + shifted_BTHWD @ module.convolution.weight[:, :, t, h, w].T
    expected = window_means(summed_BTHWM, (4 // frame_divisor, 8, 8))
    torch.testing.assert_close(module(tokens_BTHWD), expected, rtol=1e-4, atol=1e-4)


def test_class_tokens_stand_before_the_registers_and_the_grid_behind_row_by_row():
    tokens = prefixed(RAW)
    class_BTHWD = resampler("class_token")(tokens)
    assert torch.equal(class_BTHWD[:, :, 0, 0], tokens.prefix_BTKD[:, :, 0])
    every_BTHWD = resampler("all_tokens")(tokens)
    assert torch.equal(every_BTHWD[:, :, :1], class_BTHWD)
    assert torch.equal(every_BTHWD[:, 2, 1 + 5 * 9 + 7, 0], tokens.tokens_BTHWD[:, 2, 5, 7])


def test_class_tokens_need_no_grid_and_serve_from_a_pooled_store():
    prefix_BTKD = prefixed(POOLED).prefix_BTKD
    tokens = PrefixedTokens(tokens_BTHWD=None, prefix_BTKD=prefix_BTKD)
    assert torch.equal(resampler("class_token", stored=POOLED)(tokens)[:, :, 0, 0], prefix_BTKD[:, :, 0])


@pytest.mark.parametrize(
    ("name", "row", "options", "kind"),
    [
        ("attention", "2d-attention", "--grid raw", "raw"),
        ("convolution", "2d-convolution", "--grid raw", "raw"),
        ("convolution_3d", "3d-convolution", "--grid raw", "raw"),
        ("all_tokens", "all-tokens", "--grid raw --prefix-tokens", "raw-class"),
    ],
)
def test_a_pooled_store_is_refused_with_the_command_that_makes_a_raw_one(name, row, options, kind):
    message = (
        f"projector {row} reads the encoder's own grid, the stored 4x8x8 is pooled: .*{options}"
        f" --store features/NAME-{kind}.zarr` and the --config, --weights and --root that this store was made with"
    )
    with pytest.raises(UserError, match=message):
        resampler(name, stored=POOLED)


@pytest.mark.parametrize(("name", "kind"), [("class_token", "class"), ("all_tokens", "raw-class")])
def test_a_store_without_class_tokens_is_refused_with_the_command_that_stores_them(name, kind):
    message = rf"no class token is stored.*`merv-pipeline extract .*--prefix-tokens --store features/NAME-{kind}\.zarr"
    with pytest.raises(UserError, match=message):
        resampler(name, stored=replace(RAW, num_prefix=0))


@pytest.mark.parametrize("name", ["average", "attention", "convolution", "convolution_3d"])
def test_a_grid_finer_than_the_store_is_refused(name):
    with pytest.raises(UserError, match="projector grid 4x8x10 is finer than the stored grid 4x9x9; set"):
        resampler(name, grid=(4, 8, 10))


@pytest.mark.parametrize("name", ["attention", "convolution"])
def test_resamplers_of_frames_refuse_to_merge_them(name):
    with pytest.raises(UserError, match=rf"2d-{name} works frame by frame: its grid 2x8x8 must keep the 4 time steps"):
        resampler(name, grid=(2, 8, 8))


@pytest.mark.parametrize("name", ["average", "convolution_3d"])
def test_a_frame_divisor_divides_the_frames(name):
    with pytest.raises(UserError, match="frame_divisor 3 does not divide the 4 stored time steps"):
        resampler(name, frame_divisor=3)


def test_heads_of_the_attention_divide_its_width():
    with pytest.raises(UserError, match="attention has 8 heads, which do not divide the encoder's width 12"):
        resampler("attention", stored=replace(RAW, width=12))
