"""The released model's checkpoint at its published sizes, on the meta device: names and shapes written out by hand.

They follow princetonvisualai/merv: four encoders, linear heads, one cross-attention with a query of 3,072, and
LLaMA-2-7B with its vocabulary filled up to 32,064 rows.
"""

import pytest
import torch
from transformers import LlamaConfig

from mervcache.errors import UserError
from trainer.model.llm import load_llm
from trainer.official import convert, parse_settings

SETTINGS = {
    "arch_specifier": "no-align+3davg+linear",
    "feature_fusion": "cross_attention_avg_lq",
    "video_backbone_ids": [
        "languagebind-video-noclass",
        "dinov2-video-all-tokens",
        "vivit-google-b-all-no-cls-16frames",
        "siglip-vit-b16-224px-all-no-cls",
    ],
    "llm_backbone_id": "llama2-7b-pure",
    "num_frames": [16, 16, 32, 16],
    "projector_token_length": 64,
    "visual_feature_length": 1024,
}
WIDTHS = (1024, 1024, 768, 768)
M, QUERY, ROWS, LAYERS, MLP = 4096, 3072, 32064, 32, 11008
LAYER = {
    **{f"self_attn.{name}_proj.weight": (M, M) for name in "qkvo"},
    "mlp.gate_proj.weight": (MLP, M),
    "mlp.up_proj.weight": (MLP, M),
    "mlp.down_proj.weight": (M, MLP),
    "input_layernorm.weight": (M,),
    "post_attention_layernorm.weight": (M,),
}
LLM = {
    "llm.model.embed_tokens.weight": (ROWS, M),
    **{f"llm.model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER.items()},
    "llm.model.norm.weight": (M,),
    "llm.lm_head.weight": (ROWS, M),
}
PROJECTORS = {
    f"{index}.projector.projector.{kind}": shape
    for index, width in enumerate(WIDTHS)
    for kind, shape in (("weight", (M, width)), ("bias", (M,)))
}
FUSIONS = {
    "cross_attention_avg_lq": {
        "Q": (1, QUERY),
        "attention.q_proj_weight": (QUERY, QUERY),
        "attention.k_proj_weight": (QUERY, M),
        "attention.v_proj_weight": (QUERY, M),
        "attention.in_proj_bias": (3 * QUERY,),
        "attention.out_proj.weight": (QUERY, QUERY),
        "attention.out_proj.bias": (QUERY,),
    },
    "concat_channel_ln": {
        "0.weight": (4 * M,),
        "0.bias": (4 * M,),
        "1.projector.weight": (M, 4 * M),
        "1.projector.bias": (M,),
    },
}
DEAD = {"attention.v_proj_weight", "attention.out_proj.weight", "attention.out_proj.bias"}


def on_meta(shapes):
    return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}


@pytest.fixture
def llama(tmp_path):
    """LLaMA-2-7B's sizes, with the tokenizer of a small LLM, which no shape depends on."""
    load_llm("fresh:mini", texts=["red"]).tokenizer.save_pretrained(tmp_path)
    sizes = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5)
    assert (sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers) == (M, MLP, LAYERS)
    sizes.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def take(llama):
    def converted(fusion="cross_attention_avg_lq", **changes):
        settings = {**SETTINGS, "feature_fusion": fusion}
        parts = {"projectors": PROJECTORS, "feature_fusion": FUSIONS[fusion], "llm_backbone": LLM, **changes}
        saved = {"model": {part: on_meta(shapes) for part, shapes in parts.items()}, "step": 5979}
        return convert(saved, parse_settings(settings), settings, llama, None)

    return converted


def test_the_layout_written_out_here_has_the_published_sizes():
    def size(shapes):
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    assert size(PROJECTORS) == 14_696_448
    assert size(LLM) == 6_738_939_904
    assert f"{size(FUSIONS['cross_attention_avg_lq']) / 1e6:.2f}" == "44.06"
    assert len(LLM) + len(PROJECTORS) == 291 + 8


def test_every_name_and_shape_of_the_released_model_is_taken(take):
    imported = take()
    parameters = {part: sizes["total"] for part, sizes in imported.record.parameters.items()}
    assert parameters["projectors"] == 14_696_448
    assert parameters["llm"] == 6_738_939_904
    assert parameters["fusion"] == QUERY + QUERY * QUERY + QUERY + QUERY * M  # 22.03 M of 44.06 M do something
    assert imported.record.num_visual_tokens == 1024
    assert imported.config.fusion.query_width == QUERY
    assert imported.left_out == sorted(f"feature_fusion.{name}" for name in DEAD)
    assert {name for name in imported.weights if name.startswith("llm.")} == set(LLM)
    assert len(imported.weights) == len(LLM) + len(PROJECTORS) + 4
    assert [shape.grid for shape in imported.record.shapes.values()] == [(16, 8, 8)] * 4
    assert [shape.width for shape in imported.record.shapes.values()] == list(WIDTHS)


def test_channels_side_by_side_are_taken_at_their_published_width(take):
    imported = take("concat_channel_ln")
    assert imported.weights["fusion.linear.weight"].shape == (M, 4 * M)
    assert imported.record.parameters["fusion"]["total"] == 4 * M * M + M + 2 * 4 * M
    assert imported.left_out == []


def test_a_layer_less_or_another_width_is_named(take):
    short = {name: shape for name, shape in LLM.items() if ".layers.31." not in name}
    with pytest.raises(UserError, match=r"missing: llm\.model\.layers\.31\.input_layernorm\.weight"):
        take(llm_backbone=short)
    with pytest.raises(UserError, match=r"projectors\.2\.head\.bias is \[4095\], should be \[4096\]"):
        take(projectors={**PROJECTORS, "2.projector.projector.bias": (4095,)})
