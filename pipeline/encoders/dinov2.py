"""DINOv2 ViT-L/14 with registers (arXiv 2304.07193, 2309.16588): every frame by itself.

MERV reads the second to last block without a final norm and drops the class token and the four registers. The
published position embeddings are for 37 x 37 patches (518 pixels); they are resampled once, at load, the way both
timm and transformers do (bicubic, antialiased, in float32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.encoders.base import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from pipeline.views import ResizeRule

if TYPE_CHECKING:
    from torch import nn

    from pipeline.encoders.network import EncoderNetwork

DINOV2 = EncoderSpec(
    name="dinov2",
    summary="DINOv2 ViT-L/14 with registers: self-supervised image features, spatial detail",
    model="dinov2-with-registers",
    hub_id="facebook/dinov2-with-registers-large",
    builder="pipeline.encoders.dinov2:build",
    architecture={
        "image_size": 224,
        "patch_size": 14,
        "position_grid": 37,  # patches per side of the published position embeddings
        "num_frames": 16,
        "tubelet_frames": 1,
        "hidden_size": 1024,
        "num_layers": 24,
        "num_heads": 16,
        "mlp_size": 4096,
        "activation": "gelu",
        "norm_eps": 1e-6,
    },
    temporal_reach="frame",
    resize=ResizeRule(filter="bicubic"),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    prefix_tokens=5,
    skipped_blocks=1,
)


def build(spec: EncoderSpec) -> EncoderNetwork:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from pipeline.encoders.huggingface import HuggingFaceNetwork

    sizes = spec.architecture
    return HuggingFaceNetwork(
        spec,
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        {
            "image_size": sizes["position_grid"] * sizes["patch_size"],
            "patch_size": sizes["patch_size"],
            "mlp_ratio": sizes["mlp_size"] // sizes["hidden_size"],
            "num_register_tokens": spec.prefix_tokens - 1,
        },
        unused=("embeddings.mask_token",),
        published_names={
            r"attention\.q_proj": "attention.attention.query",
            r"attention\.k_proj": "attention.attention.key",
            r"attention\.v_proj": "attention.attention.value",
            r"attention\.o_proj": "attention.output.dense",
        },
        finish=lambda model: _resample_positions(model, spec.grid[1]),
    )


def _resample_positions(model: nn.Module, side: int) -> None:
    """Position embeddings [1, 1 + P, D] -> [1, 1 + side * side, D]; the first is the class token's."""
    import torch

    from_class, from_patches = model.embeddings.position_embeddings.data.tensor_split([1], dim=1)
    old_side = round(from_patches.shape[1] ** 0.5)
    if old_side == side:
        return
    maps_1DHW = from_patches.unflatten(1, (old_side, old_side)).permute(0, 3, 1, 2)
    maps_1DHW = torch.nn.functional.interpolate(maps_1DHW, (side, side), mode="bicubic", antialias=True)
    resampled = maps_1DHW.permute(0, 2, 3, 1).flatten(1, 2)
    model.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([from_class, resampled], dim=1))
