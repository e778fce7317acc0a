"""Parameters and multiply-adds of arXiv 2501.01426 at their real sizes, on the meta device.

The paper's "FLOPs" are multiply-adds, one each, with pooling counted by its inputs; attention's own products are left
out where a fused kernel ran. Its projector table has LanguageBind alone (width 1024, 16 x 16 patches), 8 frames but
where it says 16, and no head.
"""

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config import PROJECTORS, RESAMPLERS, FusionConfig, ProjectorConfig, import_choice
from trainer.data.tokens import TokenShape
from trainer.model.fusion import build_fusion
from trainer.model.projectors import build_projectors

LLM_WIDTH = 4096  # LLaMA-2-7B
WIDTHS = {"languagebind": 1024, "dinov2": 1024, "vivit": 768, "siglip": 768}
VISUAL_TOKENS = 16 * 64
ENCODER_MACS = 3.695e12  # of the four on 16 frames
TEXT_TOKENS = 880  # of the random text that was measured with
aten = torch.ops.aten
LINEAR = (aten.mm, aten.addmm)


def num_parameters(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def multiply_adds(module, *inputs, only=None):
    """All of them, or those of the operators `only`."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    counts = counter.get_flop_counts().get("Global", {})
    return sum(flops for operator, flops in counts.items() if only is None or operator in only) // 2


def languagebind(num_frames):
    return TokenShape(grid=(num_frames, 16, 16), width=1024, is_pooled=False, identity="test", num_prefix=1)


def resampler_at_real_size(config, num_frames):
    with torch.device("meta"):
        built = import_choice(RESAMPLERS, config.resampler)(config, languagebind(num_frames), LLM_WIDTH)
        return built, torch.empty(1, num_frames, 16, 16, 1024)


@pytest.mark.parametrize(
    ("row", "parameters", "macs", "published"),
    [
        # queries, two norms, q k v out (k without bias), MLP; per frame 64 queries and 256 keys
        (
            "2d-attention",
            64 * 1024 + 2 * 2048 + 4 * 1024**2 + 3 * 1024 + 8 * 1024**2 + 5 * 1024,
            8 * 1024**2 * (2 * 64 + 2 * 256 + 8 * 64),
            ("12.7M", "9.7G"),
        ),
        ("2d-convolution", 237_384_960, 241_153_605_632, ("237M", "241G")),
        ("3d-convolution", 27 * 1024 * 4096 + 4096, 8 * 256 * 27 * 1024 * 4096, ("113M", "232G")),
    ],
)
def test_trained_resamplers_of_the_projector_table(row, parameters, macs, published):
    resampler, tokens_BTHWD = resampler_at_real_size(PROJECTORS[row], 8)
    products = 2 * 8 * 64 * 256 * 1024 if row == "2d-attention" else 0  # scores and mixing, which the paper leaves out
    assert num_parameters(resampler) == parameters
    assert multiply_adds(resampler, tokens_BTHWD) == macs + products
    rounded = [f"{parameters / 1e6:.3g}M", f"{macs / 1e9:.{len(published[1].replace('.', '')) - 1}g}G"]
    assert rounded == list(published)


@pytest.mark.parametrize(
    ("num_frames", "grid", "pooled"),
    [
        (8, (8, 8, 8), 2_097_152),  # 2D Avg: 2.1 M
        (16, (16, 8, 8), 4_194_304),  # 2D Avg*: 4.2 M
        (16, (8, 8, 8), 4_194_304),  # 3D Avg*: 4.2 M
    ],
)
def test_averages_of_the_projector_table_only_pool(num_frames, grid, pooled):
    resampler, tokens_BTHWD = resampler_at_real_size(ProjectorConfig(grid=grid), num_frames)
    count = {aten._adaptive_avg_pool3d: lambda shape, *_, **__: prod(shape)}
    with FlopCounterMode(display=False, custom_mapping=count) as counter:
        pooled_BTHWD = resampler(tokens_BTHWD)
    assert pooled_BTHWD.shape == (1, *grid, 1024)
    assert (num_parameters(resampler), counter.get_total_flops()) == (0, pooled)


def projectors_at_real_size(**settings):
    shapes = {
        encoder: TokenShape(grid=(16, 8, 8), width=width, is_pooled=True, identity="test")
        for encoder, width in WIDTHS.items()
    }
    with torch.device("meta"):
        return build_projectors(ProjectorConfig(**settings), shapes, LLM_WIDTH)


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({}, 14_696_448),  # 4096 x (1024 + 1024 + 768 + 768) weights, 4 x 4096 biases
        ({"pre_layer_norm": True}, 14_696_448 + 2 * sum(WIDTHS.values())),
        ({"head": "gelu-mlp"}, 14_696_448 + 4 * (4096 * 4096 + 4096)),
        (
            {"head": "fused-gelu-mlp"},
            sum(w * 4 * w + 4 * w + 4 * w * 4096 + 4096 + 4096 * 4096 + 4096 for w in WIDTHS.values()),
        ),
    ],
)
def test_parameters_of_the_four_projectors(settings, parameters):
    assert num_parameters(*projectors_at_real_size(**settings).values()) == parameters


def projector_macs():
    return sum(
        multiply_adds(projector, torch.empty(1, 16, 8, 8, WIDTHS[encoder], device="meta"))
        for encoder, projector in projectors_at_real_size().items()
    )


def test_multiply_adds_of_the_four_projectors():
    assert projector_macs() == VISUAL_TOKENS * LLM_WIDTH * sum(WIDTHS.values())
    assert f"{projector_macs() / 1e12:.3f}" == "0.015"


def fusion_at_real_size(name):
    with torch.device("meta"):
        fusion = build_fusion(FusionConfig(name=name), len(WIDTHS), LLM_WIDTH)
        return fusion, [torch.empty(1, VISUAL_TOKENS, LLM_WIDTH) for _ in WIDTHS]


def test_the_mixer_costs_what_was_published_once_what_it_throws_away_is_added():
    fusion, embeddings = fusion_at_real_size("cross_attention_released")
    thrown_away = 4 * LLM_WIDTH * 3072 + 3072**2  # value and output projections
    mixing = 4 * VISUAL_TOKENS * LLM_WIDTH  # element-wise here, a matrix product there
    assert f"{(multiply_adds(fusion, embeddings) + thrown_away + mixing) / 1e9:.2f}" == "0.14"


def test_the_linear_layer_over_channels_costs_what_was_published():
    fusion, embeddings = fusion_at_real_size("concat_channel")
    assert f"{multiply_adds(fusion, embeddings) / 1e12:.4f}" == "0.0687"
    assert f"{num_parameters(fusion) / 1e6:.1f}" == "67.1"


@pytest.fixture(scope="module")
def llama_2_7b():
    """With one more token, `<PAD>`, and embeddings padded to a multiple of 64."""
    config = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llm_macs_per_token(llama_2_7b):
    ids_BL = torch.zeros(1, 8, dtype=torch.long, device="meta")
    return multiply_adds(llama_2_7b, ids_BL, only=LINEAR) // 8


def test_the_llm_has_the_published_size(llama_2_7b, llm_macs_per_token):
    assert num_parameters(llama_2_7b) == 6_738_939_904
    embeddings, norms = 32064 * 4096, (2 * 32 + 1) * 4096
    assert llm_macs_per_token == 6_738_939_904 - embeddings - norms
    assert f"{llm_macs_per_token / 1e9:.4f}" == "6.6073"


@pytest.mark.parametrize(
    ("name", "published", "counts_attention"),  # only eager attention was counted, and two rows ran with it
    [
        ("cross_attention_released", 17.19, True),
        ("concat_sequence", 43.09, True),
        ("concat_channel", 16.29, False),
        ("learnable_weights", 16.24, False),
        ("equal_mix", 16.39, False),
    ],
)
def test_one_forward_of_the_fusion_table(name, published, counts_attention, llm_macs_per_token):
    fusion, embeddings = fusion_at_real_size(name)
    length = fusion.num_tokens(VISUAL_TOKENS) + TEXT_TOKENS
    attention = 2 * length**2 * LLM_WIDTH * 32 if counts_attention else 0
    macs = ENCODER_MACS + projector_macs() + multiply_adds(fusion, embeddings) + length * llm_macs_per_token + attention
    assert macs / 1e12 == pytest.approx(published, rel=0.007)  # the text's length differed from row to row
