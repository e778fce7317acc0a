"""A plug-in in full: ViT-B/16 of transformers as an encoder. Its distribution declares, in pyproject.toml,

[project.entry-points."merv.encoders"]
vit = "vit_plugin:VIT"
"""

from pipeline.encoders.base import HALF, EncoderSpec
from pipeline.views import ResizeRule

VIT = EncoderSpec(
    name="vit",
    summary="ViT-B/16, ImageNet-21k: supervised image features",
    model="vit",
    hub_id="google/vit-base-patch16-224-in21k",
    builder="vit_plugin:build",
    architecture={"image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_frames": 1}
    | {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_size": 3072}
    | {"activation": "gelu", "norm_eps": 1e-12},
    temporal_reach="frame",
    resize=ResizeRule(filter="bilinear"),
    mean=HALF,
    std=HALF,
    prefix_tokens=1,
    skipped_blocks=1,
)


def build(spec):
    from transformers import ViTConfig, ViTModel

    from pipeline.encoders.huggingface import HuggingFaceNetwork

    sizes = {"image_size": spec.architecture["image_size"], "patch_size": spec.architecture["patch_size"]}
    sizes["intermediate_size"] = spec.architecture["mlp_size"]
    return HuggingFaceNetwork(spec, ViTModel, ViTConfig, sizes, model_options={"add_pooling_layer": False})
