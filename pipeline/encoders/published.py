"""The built-in encoders: one `EncoderSpec` each, with its builder where it needs code of its own.

To add one, write its spec and builder here and list it in `PUBLISHED`. Sizes, layers and preprocessing are MERV's
(arXiv 2501.01426) for its four encoders; the others are for comparisons.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mervcache.errors import UserError
from pipeline.encoders.base import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from pipeline.views import ResizeRule

if TYPE_CHECKING:
    from pipeline.encoders.network import EncoderNetwork

VIT_BASE = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_size": 3072}
VIT_LARGE = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_size": 4096}
# transformers' name of an attention projection -> the published checkpoint's
ATTENTION_NAMES = {
    r"attention\.q_proj": "attention.attention.query",
    r"attention\.k_proj": "attention.attention.key",
    r"attention\.v_proj": "attention.attention.value",
    r"attention\.o_proj": "attention.output.dense",
}


def _build(spec: EncoderSpec, family: str, sizes: dict[str, Any], **options: Any) -> EncoderNetwork:
    """A network of transformers' `{family}Model` and `{family}Config`; see `HuggingFaceNetwork` for the rest."""
    import transformers

    from pipeline.encoders.huggingface import HuggingFaceNetwork

    model_class, config_class = getattr(transformers, f"{family}Model"), getattr(transformers, f"{family}Config")
    return HuggingFaceNetwork(spec, model_class, config_class, sizes, **options)


# LanguageBind's video tower (arXiv 2310.01852): CLIP ViT-L/14 with attention over time in every block, LoRA already
# merged into dense weights. Time attention works in chunks of 8 frames. MERV feeds 16, which silently makes two
# independent halves; its results depend on that, so it is kept, and counts that leave a partial chunk are refused. MERV
# flips clips at random, in evaluation too; this does not.
LANGUAGEBIND = EncoderSpec(
    name="languagebind",
    summary="LanguageBind video ViT-L/14: clip features aligned with language",
    model="languagebind-video",
    hub_id="LanguageBind/LanguageBind_Video_merge",
    licence="mit",
    builder=f"{__name__}:build_languagebind",
    architecture={"image_size": 224, "patch_size": 14, "num_frames": 16, "frames_per_chunk": 8, "tubelet_frames": 1}
    | VIT_LARGE
    | {"activation": "gelu", "norm_eps": 1e-5},
    temporal_reach="chunk",
    # short side to 224 by torch's bilinear interpolation without antialiasing, then the centre
    resize=ResizeRule(filter="bilinear", antialias=False, fit="centre-crop"),
    mean=CLIP_MEAN,
    std=CLIP_STD,
    prefix_tokens=1,
    skipped_blocks=1,
)


def build_languagebind(spec: EncoderSpec) -> EncoderNetwork:
    from pipeline.encoders.languagebind import LanguageBindTower

    return LanguageBindTower(spec)


# DINOv2 ViT-L/14 with registers (arXiv 2304.07193, 2309.16588): every frame by itself. MERV reads the second to last
# block without a final norm and drops the class token and the four registers.
DINOV2 = EncoderSpec(
    name="dinov2",
    summary="DINOv2 ViT-L/14 with registers: self-supervised image features, spatial detail",
    model="dinov2-with-registers",
    hub_id="facebook/dinov2-with-registers-large",
    licence="apache-2.0",
    builder=f"{__name__}:build_dinov2",
    # position_grid: patches per side of the published position embeddings (518 pixels)
    architecture={"image_size": 224, "patch_size": 14, "position_grid": 37, "num_frames": 16, "tubelet_frames": 1}
    | VIT_LARGE
    | {"activation": "gelu", "norm_eps": 1e-6},
    temporal_reach="frame",
    resize=ResizeRule(filter="bicubic"),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    prefix_tokens=5,
    skipped_blocks=1,
)


def build_dinov2(spec: EncoderSpec) -> EncoderNetwork:
    return _build_dinov2(spec, "Dinov2WithRegisters", {"num_register_tokens": spec.prefix_tokens - 1}, antialias=True)


def _build_dinov2(
    spec: EncoderSpec, family: str, config: dict[str, Any], *, antialias: bool, **options: Any
) -> EncoderNetwork:
    """DINOv2 as `family` of transformers; `antialias` is how that class resamples its position embeddings."""
    sizes = spec.architecture
    common = {
        "image_size": sizes["position_grid"] * sizes["patch_size"],
        "patch_size": sizes["patch_size"],
        "mlp_ratio": sizes["mlp_size"] // sizes["hidden_size"],
    }
    return _build(
        spec,
        family,
        common | config,
        blocks="encoder.layer",
        unused=("embeddings.mask_token",),
        published_names=ATTENTION_NAMES,
        finish=lambda model: _resample_positions(model, spec.grid[1], antialias=antialias),
        **options,
    )


def _resample_positions(model: Any, side: int, *, antialias: bool) -> None:
    """Position embeddings [1, 1 + P, D] -> [1, 1 + side * side, D]; the first is the class token's.

    Once, at load, the way transformers does: bicubic, in float32, antialiased for DINOv2 with registers only.
    """
    import torch

    from_class, from_patches = model.embeddings.position_embeddings.data.tensor_split([1], dim=1)
    old_side = round(from_patches.shape[1] ** 0.5)
    if old_side == side:
        return
    maps_1DHW = from_patches.unflatten(1, (old_side, old_side)).permute(0, 3, 1, 2)
    maps_1DHW = torch.nn.functional.interpolate(maps_1DHW, (side, side), mode="bicubic", antialias=antialias)
    resampled = maps_1DHW.permute(0, 2, 3, 1).flatten(1, 2)
    model.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([from_class, resampled], dim=1))


# ViViT-B/16x2 trained on Kinetics-400 (arXiv 2103.15691, model 1): joint attention over all of a clip; 32 frames become
# 16 time steps of tubelets. MERV reads the last block through the final norm, unlike its other three encoders, and
# drops the class token. Every step sees every frame, so a still image has no shorter period than a clip.
VIVIT = EncoderSpec(
    name="vivit",
    summary="ViViT-B/16x2, Kinetics-400: motion and actions",
    model="vivit",
    hub_id="google/vivit-b-16x2-kinetics400",
    licence="mit",
    builder=f"{__name__}:build_vivit",
    architecture={"image_size": 224, "patch_size": 16, "num_frames": 32, "tubelet_frames": 2}
    | VIT_BASE
    | {"activation": "gelu_fast", "norm_eps": 1e-6},
    temporal_reach="clip",
    resize=ResizeRule(filter="bilinear"),
    mean=HALF,
    std=HALF,
    prefix_tokens=1,
    final_norm=True,
)


def build_vivit(spec: EncoderSpec) -> EncoderNetwork:
    sizes = spec.architecture
    config = {
        "image_size": sizes["image_size"],
        "tubelet_size": (sizes["tubelet_frames"], sizes["patch_size"], sizes["patch_size"]),
        "num_frames": sizes["num_frames"],
        "intermediate_size": sizes["mlp_size"],
    }
    mlp_names = {r"mlp\.fc1": "intermediate.dense", r"mlp\.fc2": "output.dense"}
    return _build(
        spec,
        "Vivit",
        config,
        blocks="layers",
        model_options={"add_pooling_layer": False},
        published_names={r"^layers\.": "encoder.layer."} | ATTENTION_NAMES | mlp_names,
    )


# SigLIP ViT-B/16 at 224 pixels (arXiv 2303.15343): every frame by itself, no class token. MERV reads the second to last
# block without a final norm. The weights were trained with the tanh form of GELU, which transformers runs; for the
# exact form of MERV's release (timm) set the architecture's `activation` to `gelu`.
SIGLIP = EncoderSpec(
    name="siglip",
    summary="SigLIP ViT-B/16: image features aligned with language, good at text in images",
    model="siglip",
    hub_id="google/siglip-base-patch16-224",
    licence="apache-2.0",
    builder=f"{__name__}:build_siglip",
    architecture={"image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_frames": 1}
    | VIT_BASE
    | {"activation": "gelu_pytorch_tanh", "norm_eps": 1e-6},
    temporal_reach="frame",
    resize=ResizeRule(filter="bicubic"),
    mean=HALF,
    std=HALF,
    skipped_blocks=1,
)


def build_siglip(spec: EncoderSpec) -> EncoderNetwork:
    choices = {"hidden_act": spec.architecture["activation"], "vision_use_head": False}
    return _build(
        spec, "SiglipVision", _image_sizes(spec), choices=choices, final_norm="post_layernorm", blocks="encoder.layers"
    )


# CLIP ViT-L/14 (arXiv 2103.00020): every frame by itself; features of the second to last block without a final norm, as
# in LLaVA and Video-LLaVA. Frames are squashed like those of the other image encoders, so grids cover the same pixels.
CLIP = EncoderSpec(
    name="clip",
    summary="CLIP ViT-L/14: image features aligned with language",
    model="clip",
    hub_id="openai/clip-vit-large-patch14",
    licence="mit",
    builder=f"{__name__}:build_clip",
    architecture={"image_size": 224, "patch_size": 14, "num_frames": 16, "tubelet_frames": 1}
    | VIT_LARGE
    | {"activation": "quick_gelu", "norm_eps": 1e-5},
    temporal_reach="frame",
    resize=ResizeRule(filter="bicubic"),
    mean=CLIP_MEAN,
    std=CLIP_STD,
    prefix_tokens=1,
    skipped_blocks=1,
)


def build_clip(spec: EncoderSpec) -> EncoderNetwork:
    # post_layernorm is applied to the class token only
    return _build(
        spec, "CLIPVision", _image_sizes(spec), final_norm=None, blocks="encoder.layers", unused=("post_layernorm",)
    )


# VideoMAE ViT-B/16 fine-tuned on Kinetics-400 (arXiv 2203.12602): 16 frames become 8 time steps of tubelets, no class
# token; features of the last block without a norm, since the published model norms only the mean of all tokens.
# Position embeddings are a fixed sine table, so other frame counts work with the same weights: 32 frames give 16 steps.
VIDEOMAE = EncoderSpec(
    name="videomae",
    summary="VideoMAE ViT-B/16, Kinetics-400: masked video modelling, 8 time steps",
    model="videomae",
    hub_id="MCG-NJU/videomae-base-finetuned-kinetics",
    licence="cc-by-nc-4.0",
    builder=f"{__name__}:build_videomae",
    architecture={"image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_frames": 2}
    | VIT_BASE
    | {"activation": "gelu", "norm_eps": 1e-12},
    temporal_reach="clip",
    resize=ResizeRule(filter="bilinear"),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)


def build_videomae(spec: EncoderSpec) -> EncoderNetwork:
    tubelets = {"tubelet_size": spec.architecture["tubelet_frames"], "use_mean_pooling": True}  # no norm of tokens
    return _build(
        spec,
        "VideoMAE",
        _image_sizes(spec) | tubelets,
        final_norm=None,
        blocks="encoder.layer",
        choices={"num_frames": spec.architecture["num_frames"]},
        published_names={r"query\.bias": "q_bias", r"value\.bias": "v_bias"},
    )


# SigLIP 2 ViT-B/16 at 224 pixels (arXiv 2502.14786): SigLIP's network with other weights, trained for localisation and
# dense features too; read where SigLIP is.
SIGLIP2 = replace(
    SIGLIP,
    name="siglip2",
    summary="SigLIP 2 ViT-B/16: image features aligned with language, better localised than SigLIP's",
    hub_id="google/siglip2-base-patch16-224",
)


# DINOv3 ViT-L/16 (arXiv 2508.10104): every frame by itself, rotary positions, a class token and four registers; the
# last block through the final norm, which is what its authors evaluate dense features with.
DINOV3 = EncoderSpec(
    name="dinov3",
    summary="DINOv3 ViT-L/16: self-supervised image features, spatial detail",
    model="dinov3",
    hub_id="facebook/dinov3-vitl16-pretrain-lvd1689m",
    licence="dinov3-license",
    gated=True,
    builder=f"{__name__}:build_dinov3",
    architecture={"image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_frames": 1}
    | VIT_LARGE
    | {"activation": "gelu", "norm_eps": 1e-5},
    temporal_reach="frame",
    resize=ResizeRule(filter="bicubic"),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    prefix_tokens=5,
    final_norm=True,
)


def build_dinov3(spec: EncoderSpec) -> EncoderNetwork:
    sizes = {
        "patch_size": spec.architecture["patch_size"],
        "intermediate_size": spec.architecture["mlp_size"],
        "num_register_tokens": spec.prefix_tokens - 1,
    }
    choices = {"image_size": spec.architecture["image_size"]}  # rotary positions: weights fit any size
    return _build(
        spec,
        "DINOv3ViT",
        sizes,
        choices=choices,
        final_norm="norm",
        blocks="model.layer",
        unused=("embeddings.mask_token",),
        published_names={r"^model\.layer\.": "layer."},
    )


# V-JEPA 2 ViT-L/16 at 256 pixels (arXiv 2506.09985): joint attention over a clip of tubelets with rotary positions in
# time, height and width. It was trained on 64 frames; the 32 that all encoders share give 16 time steps. The last block
# through the final norm, without the predictor. Frames are squashed, where its authors crop.
VJEPA2 = EncoderSpec(
    name="vjepa2",
    summary="V-JEPA 2 ViT-L/16: self-supervised video features, motion",
    model="vjepa2",
    hub_id="facebook/vjepa2-vitl-fpc64-256",
    licence="mit",
    builder=f"{__name__}:build_vjepa2",
    architecture={"image_size": 256, "patch_size": 16, "num_frames": 32, "tubelet_frames": 2}
    | VIT_LARGE
    | {"activation": "gelu", "norm_eps": 1e-6},
    temporal_reach="clip",
    resize=ResizeRule(filter="bilinear"),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    final_norm=True,
)


def build_vjepa2(spec: EncoderSpec) -> EncoderNetwork:
    sizes = spec.architecture
    return _build(
        spec,
        "VJEPA2",
        {
            "patch_size": sizes["patch_size"],
            "tubelet_size": sizes["tubelet_frames"],
            "mlp_ratio": sizes["mlp_size"] / sizes["hidden_size"],
        },
        # Rotary positions fit any size; the predictor, which is not used, need not be built whole.
        choices={
            "crop_size": sizes["image_size"],
            "frames_per_clip": sizes["num_frames"],
            "pred_num_hidden_layers": 1,
        },
        final_norm="encoder.layernorm",
        blocks="encoder.layer",
        unused=("predictor",),
        call_options={"skip_predictor": True},
    )


# Perception Encoder PE-Lang L/14 at 448 pixels (arXiv 2504.13181): every frame by itself, rotary and learned positions.
# It was aligned with a language model after contrastive training, and its 23rd block, without a norm, is what the
# Perception Language Model reads. transformers takes it from timm, so this does too.
PE = EncoderSpec(
    name="pe",
    summary="Perception Encoder PE-Lang L/14: image features aligned with a language model; needs timm",
    model="timm/vit_pe_lang_large_patch14_448",
    hub_id="timm/vit_pe_lang_large_patch14_448.fb",
    licence="apache-2.0",
    builder=f"{__name__}:build_pe",
    architecture={"image_size": 448, "patch_size": 14, "position_grid": 32, "num_frames": 16, "tubelet_frames": 1}
    | VIT_LARGE
    | {"num_layers": 23, "activation": "gelu", "norm_eps": 1e-5},
    temporal_reach="frame",
    resize=ResizeRule(filter="bicubic"),
    mean=HALF,
    std=HALF,
    prefix_tokens=1,
)


def build_pe(spec: EncoderSpec) -> EncoderNetwork:
    from pipeline.encoders.timm_network import TimmNetwork

    for key in ("activation", "norm_eps"):
        if spec.architecture[key] != PE.architecture[key]:
            raise UserError(f"{key} of {spec.name} is {PE.architecture[key]!r}, got {spec.architecture[key]!r}")
    return TimmNetwork(spec)


# Depth Anything V2's encoder (arXiv 2406.09414): DINOv2 ViT-L/14 trained on for depth in single images, so its features
# describe geometry. It is read behind the last block and the final norm, as the depth head reads it, and at 224 pixels,
# where it sees the frames of DINOv2; its authors use 518.
DEPTHANYTHING = replace(
    DINOV2,
    name="depthanything",
    summary="Depth Anything V2 ViT-L/14: DINOv2 trained on for depth, geometry of single images",
    model="depth-anything-v2",
    licence="cc-by-nc-4.0",
    hub_id="depth-anything/Depth-Anything-V2-Large-hf",
    builder=f"{__name__}:build_depthanything",
    prefix_tokens=1,
    skipped_blocks=0,
    final_norm=True,
)


def build_depthanything(spec: EncoderSpec) -> EncoderNetwork:
    return _build_dinov2(spec, "Dinov2", {}, antialias=False, part="backbone")


# VideoMAE v2 ViT-B/16 pre-trained on UnlabeledHybrid (arXiv 2303.16727): VideoMAE's encoder with other weights, read
# where VideoMAE is. transformers has no class of that name; the checkpoint has the names of the authors' code, with
# query, key and value in one matrix, and is loaded into transformers' VideoMAE.
VIDEOMAE2 = replace(
    VIDEOMAE,
    name="videomae2",
    summary="VideoMAE v2 ViT-B/16: masked video modelling on a million clips, 8 time steps",
    hub_id="OpenGVLab/VideoMAEv2-Base",
    builder=f"{__name__}:build_videomae2",
    architecture={**VIDEOMAE.architecture, "norm_eps": 1e-6},
)


def build_videomae2(spec: EncoderSpec) -> EncoderNetwork:
    from pipeline.encoders.videomae2 import VideoMAE2Network

    return VideoMAE2Network(spec, build_videomae(spec))


def _image_sizes(spec: EncoderSpec) -> dict[str, Any]:
    sizes = spec.architecture
    return {
        "image_size": sizes["image_size"],
        "patch_size": sizes["patch_size"],
        "intermediate_size": sizes["mlp_size"],
    }


_ALL = (LANGUAGEBIND, DINOV2, VIVIT, SIGLIP, CLIP, VIDEOMAE, SIGLIP2, DINOV3, VJEPA2, PE, VIDEOMAE2, DEPTHANYTHING)
PUBLISHED = {spec.name: spec for spec in _ALL}
