"""SigLIP ViT-B/16 at 224 pixels (arXiv 2303.15343): every frame by itself, no class token.

MERV reads the second to last block without a final norm. Its GELU is a choice: transformers runs the tanh form that
the weights were trained with (our default); the timm version of MERV's release runs the exact one. Set the
architecture's `activation` to `gelu` for the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.encoders.base import HALF, EncoderSpec
from pipeline.views import ResizeRule

if TYPE_CHECKING:
    from pipeline.encoders.network import EncoderNetwork

SIGLIP = EncoderSpec(
    name="siglip",
    summary="SigLIP ViT-B/16: image features aligned with language, good at text in images",
    model="siglip",
    hub_id="google/siglip-base-patch16-224",
    builder="pipeline.encoders.siglip:build",
    architecture={
        "image_size": 224,
        "patch_size": 16,
        "num_frames": 16,
        "tubelet_frames": 1,
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "mlp_size": 3072,
        "activation": "gelu_pytorch_tanh",
        "norm_eps": 1e-6,
    },
    temporal_reach="frame",
    resize=ResizeRule(filter="bicubic"),
    mean=HALF,
    std=HALF,
    skipped_blocks=1,
)


def build(spec: EncoderSpec) -> EncoderNetwork:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from pipeline.encoders.huggingface import HuggingFaceNetwork

    sizes = spec.architecture
    return HuggingFaceNetwork(
        spec,
        SiglipVisionModel,
        SiglipVisionConfig,
        {
            "image_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
            "intermediate_size": sizes["mlp_size"],
        },
        choices={"hidden_act": sizes["activation"], "vision_use_head": False},
        final_norm="post_layernorm",
    )
