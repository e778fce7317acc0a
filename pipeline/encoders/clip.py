"""CLIP ViT-L/14 (arXiv 2103.00020): every frame by itself. Not one of MERV's four; for comparisons.

Features are the second to last block's without a final norm, as in LLaVA and Video-LLaVA. Frames are squashed like
those of the other image encoders, so that grids cover the same pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.encoders.base import CLIP_MEAN, CLIP_STD, EncoderSpec
from pipeline.views import ResizeRule

if TYPE_CHECKING:
    from pipeline.encoders.network import EncoderNetwork

CLIP = EncoderSpec(
    name="clip",
    summary="CLIP ViT-L/14: image features aligned with language",
    model="clip",
    hub_id="openai/clip-vit-large-patch14",
    builder="pipeline.encoders.clip:build",
    architecture={
        "image_size": 224,
        "patch_size": 14,
        "num_frames": 16,
        "tubelet_frames": 1,
        "hidden_size": 1024,
        "num_layers": 24,
        "num_heads": 16,
        "mlp_size": 4096,
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
    },
    temporal_reach="frame",
    resize=ResizeRule(filter="bicubic"),
    mean=CLIP_MEAN,
    std=CLIP_STD,
    prefix_tokens=1,
    skipped_blocks=1,
)


def build(spec: EncoderSpec) -> EncoderNetwork:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from pipeline.encoders.huggingface import HuggingFaceNetwork

    sizes = spec.architecture
    return HuggingFaceNetwork(
        spec,
        CLIPVisionModel,
        CLIPVisionConfig,
        {
            "image_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
            "intermediate_size": sizes["mlp_size"],
        },
        final_norm=None,
        unused=("post_layernorm",),  # applied to the class token only
    )
