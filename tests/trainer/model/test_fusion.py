import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import FUSIONS, FusionConfig
from trainer.model.fusion import build_fusion

E, N, M = 4, 1024, 4096  # encoders, visual tokens, LLM width of arXiv 2501.01426


def at_real_size(name):
    with torch.device("meta"):
        return build_fusion(FusionConfig(name=name), E, M)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cross_attention", 4096),
        # 22.03 M of the released code's 44.06 M have an effect; without the keys' bias, which cancels
        ("cross_attention_released", 3072 + (3072 * 3072 + 3072) + 4096 * 3072),
        ("concat_sequence", 0),
        ("concat_channel", 67_112_960),
        ("concat_channel_ln", 67_112_960 + 2 * 16384),
        ("learnable_weights", 4),
        ("equal_mix", 0),
        ("first", 0),
    ],
)
def test_parameters_at_the_real_size(name, parameters):
    assert sum(p.numel() for p in at_real_size(name).parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("concat_channel", 1024 * 16384 * 4096),  # 0.0687 T
        ("cross_attention_released", 4 * 4096 * 3072 + 3072 * 3072),  # the two projections
        ("equal_mix", 0),
    ],
)
def test_multiply_adds_at_the_real_size(name, macs):
    embeddings = [torch.empty(1, N, M, device="meta") for _ in range(E)]
    fusion = at_real_size(name)
    with FlopCounterMode(display=False) as counter:
        fusion(embeddings)
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("encoders", [1, 2, 3, 5])
def test_any_number_of_encoders_gives_the_promised_shape_and_weights_that_sum_to_one(name, encoders):
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(name=name, query_width=12), encoders, 8)
    embeddings = [torch.randn(3, 4, 8) for _ in range(encoders)]
    fused_BNM, weights_BE = fusion(embeddings)
    assert fused_BNM.shape == (3, fusion.num_tokens(4), 8)
    if weights_BE is None:
        assert name.startswith("concat")
    else:
        torch.testing.assert_close(weights_BE.sum(1), torch.ones(3))
        mixed = sum(w[:, None, None] * x for w, x in zip(weights_BE.unbind(1), embeddings, strict=False))
        torch.testing.assert_close(fused_BNM, mixed)


@pytest.mark.parametrize("name", [name for name in FUSIONS if name not in ("equal_mix", "concat_sequence", "first")])
def test_every_parameter_of_a_fusion_moves_its_output(name):
    torch.manual_seed(1)
    fusion = build_fusion(FusionConfig(name=name, query_width=12), 3, 8)
    fused_BNM, _ = fusion([torch.randn(3, 4, 8) for _ in range(3)])
    (fused_BNM * torch.randn(fused_BNM.shape)).sum().backward()
    for parameter_name, parameter in fusion.named_parameters():
        assert parameter.grad.abs().max() > 1e-7, parameter_name


def test_cross_attention_by_hand():
    fusion = build_fusion(FusionConfig(name="cross_attention"), 2, 4)
    fusion.query_M.data = torch.tensor([1.0, 0.0, 0.0, 2.0])
    first = torch.tensor([[[1.0, 0, 0, 0], [3.0, 0, 0, 2]]])  # mean (2, 0, 0, 1): score 4 / 2 = 2
    second = torch.tensor([[[0.0, 5, 0, 1], [0.0, 5, 0, 1]]])  # mean (0, 5, 0, 1): score 2 / 2 = 1
    fused_BNM, weights_BE = fusion([first, second])
    a = math.e**2 / (math.e**2 + math.e)
    torch.testing.assert_close(weights_BE, torch.tensor([[a, 1 - a]]))
    torch.testing.assert_close(fused_BNM[0, 1], torch.tensor([3 * a, 5 * (1 - a), 0.0, 2 * a + 1 - a]))


def test_the_released_cross_attention_has_the_weights_of_torch_multihead_attention():
    torch.manual_seed(2)
    fusion = build_fusion(FusionConfig(name="cross_attention_released", query_width=12), 3, 8)
    reference = torch.nn.MultiheadAttention(12, 1, kdim=8, vdim=8, batch_first=True)
    torch.nn.init.normal_(reference.in_proj_bias)  # the keys' bias must not matter
    with torch.no_grad():
        reference.q_proj_weight.copy_(fusion.query_projection.weight)
        reference.k_proj_weight.copy_(fusion.key_projection.weight)
        fusion.query_projection.bias.copy_(reference.in_proj_bias[:12])
    embeddings = [torch.randn(5, 4, 8) for _ in range(3)]
    mean_BEM = torch.stack([x.mean(1) for x in embeddings], 1)
    query = fusion.query_Q.expand(5, 1, -1)
    _, expected = reference(query, mean_BEM, mean_BEM)
    torch.testing.assert_close(fusion(embeddings)[1], expected[:, 0])


def test_learnable_weights_by_hand():
    fusion = build_fusion(FusionConfig(name="learnable_weights"), 2, 1)
    fusion.scores_E.data = torch.tensor([0.0, math.log(3.0)])
    fused_BNM, weights_BE = fusion([torch.full((1, 1, 1), 4.0), torch.full((1, 1, 1), 8.0)])
    torch.testing.assert_close(weights_BE, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(fused_BNM, torch.full((1, 1, 1), 7.0))


def test_concat_sequence_keeps_the_order_of_the_encoders():
    fused_BNM, _ = build_fusion(FusionConfig(name="concat_sequence"), 2, 1)([torch.zeros(1, 2, 1), torch.ones(1, 2, 1)])
    assert fused_BNM.flatten().tolist() == [0, 0, 1, 1]


def test_parameters_keep_their_order_in_which_the_norm_of_all_gradients_is_summed():
    fusion = build_fusion(FusionConfig(name="concat_channel_ln"), 2, 3)
    assert [name for name, _ in fusion.named_parameters()] == [
        "norm.weight",
        "norm.bias",
        "linear.weight",
        "linear.bias",
    ]


def test_concat_channel_is_a_linear_layer_over_joined_channels():
    torch.manual_seed(3)
    fusion = build_fusion(FusionConfig(name="concat_channel_ln"), 2, 3)
    first, second = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    joined = torch.cat([first, second], -1)
    normed = (joined - joined.mean(-1, keepdim=True)) / (joined.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = normed @ fusion.linear.weight.T + fusion.linear.bias
    torch.testing.assert_close(fusion([first, second])[0], expected)


SHOWN_BE = torch.tensor([[True, False, True], [False, True, False]])


def masked_and_kept(name):
    """A fusion of three encoders under masks, and of each sample the embeddings that it shows."""
    torch.manual_seed(5)
    fusion = build_fusion(FusionConfig(name=name, query_width=6), 3, 4)
    embeddings = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(3)]
    fused_BNM, weights_BE = fusion(embeddings, SHOWN_BE)
    kept = [
        [x[row : row + 1] for x, is_shown in zip(embeddings, SHOWN_BE[row], strict=True) if is_shown] for row in (0, 1)
    ]
    return fusion, embeddings, fused_BNM, weights_BE, kept


@pytest.mark.parametrize("name", ["cross_attention", "cross_attention_released", "equal_mix"])
def test_a_mix_under_a_mask_is_that_of_the_shown_encoders(name):
    fusion, _, fused_BNM, weights_BE, kept = masked_and_kept(name)
    for row, shown in enumerate(kept):
        fusion.num_encoders = len(shown)  # these fusions have no weights of an encoder
        alone_1NM, weights_1E = fusion(shown)
        torch.testing.assert_close(fused_BNM[row : row + 1], alone_1NM)
        torch.testing.assert_close(weights_BE[row][SHOWN_BE[row]], weights_1E[0])
    assert weights_BE[~SHOWN_BE].tolist() == [0, 0, 0]


def test_learned_weights_of_shown_encoders_add_up_to_one():
    fusion, embeddings, fused_BNM, weights_BE, _ = masked_and_kept("learnable_weights")
    scores = fusion.scores_E.detach()
    first, last = scores[[0, 2]].softmax(0)
    torch.testing.assert_close(fused_BNM[0], first * embeddings[0][0] + last * embeddings[2][0])
    torch.testing.assert_close(fused_BNM[1], embeddings[1][1])
    torch.testing.assert_close(weights_BE[0], torch.stack([first, torch.tensor(0.0), last]))


def test_channels_of_masked_encoders_are_zero_behind_the_norm_of_the_shown_ones():
    fusion, embeddings, fused_BNM, _, _ = masked_and_kept("concat_channel_ln")
    shown = torch.cat([embeddings[0][0], embeddings[2][0]], -1)
    normed = (shown - shown.mean(-1, keepdim=True)) / (shown.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    joined = torch.cat([normed[:, :4], torch.zeros(5, 4), normed[:, 4:]], -1)
    torch.testing.assert_close(fused_BNM[0], joined @ fusion.linear.weight.T + fusion.linear.bias)


@pytest.mark.parametrize("name", [name for name in FUSIONS if name not in ("first", "concat_sequence")])
def test_a_masked_encoder_gets_no_gradient_and_all_shown_is_no_mask(name):
    fusion, embeddings, fused_BNM, _, _ = masked_and_kept(name)
    fused_BNM.square().sum().backward()
    for index, embeddings_BNM in enumerate(embeddings):
        has_gradient = embeddings_BNM.grad.abs().sum((1, 2)) > 0
        assert torch.equal(has_gradient, SHOWN_BE[:, index])
    torch.testing.assert_close(fusion(embeddings, torch.ones(2, 3, dtype=torch.bool))[0], fusion(embeddings)[0])


@pytest.mark.parametrize("name", FUSIONS)
def test_contributions_are_what_each_encoder_adds(name):
    torch.manual_seed(3)
    fusion = build_fusion(FusionConfig(name=name, query_width=12), 3, 8)
    embeddings = [torch.randn(2, 4, 8) for _ in range(3)]
    fused_BNM, _ = fusion(embeddings)
    parts = list(fusion.contributions(embeddings))
    assert len(parts) == (1 if name == "first" else 3)
    if name == "concat_sequence":
        joined = torch.cat(parts, dim=1)
    else:
        joined = sum(parts) + (fusion.linear.bias if name.startswith("concat_channel") else 0)
    torch.testing.assert_close(joined, fused_BNM)


def test_a_contribution_of_channels_is_what_remains_when_the_others_are_zero():
    """Sums alone would also hold for parts that belong to the wrong encoders."""
    torch.manual_seed(4)
    fusion = build_fusion(FusionConfig(name="concat_channel"), 3, 8)
    embeddings = [torch.randn(2, 4, 8) for _ in range(3)]
    for index, part in enumerate(fusion.contributions(embeddings)):
        alone = [x if place == index else torch.zeros_like(x) for place, x in enumerate(embeddings)]
        torch.testing.assert_close(part, fusion(alone)[0] - fusion.linear.bias)
