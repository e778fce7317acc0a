"""VideoMAE ViT-B/16 fine-tuned on Kinetics-400 (arXiv 2203.12602). Not one of MERV's four; for comparisons.

16 frames become 8 time steps of tubelets without a class token; features are the last block's without a norm, since
the published model norms only the mean of all tokens. Position embeddings are a fixed sine table, so other frame
counts work with the same weights: 32 frames give 16 steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.encoders.base import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from pipeline.views import ResizeRule

if TYPE_CHECKING:
    from pipeline.encoders.network import EncoderNetwork

VIDEOMAE = EncoderSpec(
    name="videomae",
    summary="VideoMAE ViT-B/16, Kinetics-400: masked video modelling, 8 time steps",
    model="videomae",
    hub_id="MCG-NJU/videomae-base-finetuned-kinetics",
    builder="pipeline.encoders.videomae:build",
    architecture={
        "image_size": 224,
        "patch_size": 16,
        "num_frames": 16,
        "tubelet_frames": 2,
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "mlp_size": 3072,
        "activation": "gelu",
        "norm_eps": 1e-12,
    },
    temporal_reach="clip",
    resize=ResizeRule(filter="bilinear"),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)


def build(spec: EncoderSpec) -> EncoderNetwork:
    from transformers import VideoMAEConfig, VideoMAEModel

    from pipeline.encoders.huggingface import HuggingFaceNetwork

    sizes = spec.architecture
    return HuggingFaceNetwork(
        spec,
        VideoMAEModel,
        VideoMAEConfig,
        {
            "image_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
            "tubelet_size": sizes["tubelet_frames"],
            "intermediate_size": sizes["mlp_size"],
            "use_mean_pooling": True,  # no norm of the last block's tokens
        },
        final_norm=None,
        choices={"num_frames": sizes["num_frames"]},
        published_names={r"query\.bias": "q_bias", r"value\.bias": "v_bias"},
    )
