"""ViViT-B/16x2 trained on Kinetics-400 (arXiv 2103.15691, model 1): joint attention over all of a clip.

32 frames become 16 time steps of tubelets. MERV reads the last block through the final norm, unlike the other three
encoders, and drops the class token. Every step sees every frame, so a still image has no shorter period than a clip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.encoders.base import HALF, EncoderSpec
from pipeline.views import ResizeRule

if TYPE_CHECKING:
    from pipeline.encoders.network import EncoderNetwork

VIVIT = EncoderSpec(
    name="vivit",
    summary="ViViT-B/16x2, Kinetics-400: motion and actions",
    model="vivit",
    hub_id="google/vivit-b-16x2-kinetics400",
    builder="pipeline.encoders.vivit:build",
    architecture={
        "image_size": 224,
        "patch_size": 16,
        "num_frames": 32,
        "tubelet_frames": 2,
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "mlp_size": 3072,
        "activation": "gelu_fast",
        "norm_eps": 1e-6,
    },
    temporal_reach="clip",
    resize=ResizeRule(filter="bilinear"),
    mean=HALF,
    std=HALF,
    prefix_tokens=1,
    final_norm=True,
)


def build(spec: EncoderSpec) -> EncoderNetwork:
    from transformers import VivitConfig, VivitModel

    from pipeline.encoders.huggingface import HuggingFaceNetwork

    sizes = spec.architecture
    return HuggingFaceNetwork(
        spec,
        VivitModel,
        VivitConfig,
        {
            "image_size": sizes["image_size"],
            "tubelet_size": (sizes["tubelet_frames"], sizes["patch_size"], sizes["patch_size"]),
            "num_frames": sizes["num_frames"],
            "intermediate_size": sizes["mlp_size"],
        },
        model_options={"add_pooling_layer": False},
        published_names={
            r"^layers\.": "encoder.layer.",
            r"attention\.q_proj": "attention.attention.query",
            r"attention\.k_proj": "attention.attention.key",
            r"attention\.v_proj": "attention.attention.value",
            r"attention\.o_proj": "attention.output.dense",
            r"mlp\.fc1": "intermediate.dense",
            r"mlp\.fc2": "output.dense",
        },
    )
