"""LanguageBind's video tower (arXiv 2310.01852): CLIP ViT-L/14 with attention over time in every block.

Published as `LanguageBind_Video_merge` (LoRA already merged into dense weights, text tower beside; only
`vision_model.*` is read). Time attention works in chunks of 8 frames. MERV feeds 16, which silently makes two
independent halves; we keep that, because its results depend on it, and refuse counts that leave a partial chunk.
MERV flips clips at random, in evaluation too; we do not. Features are the second to last block's, class token dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.encoders.base import CLIP_MEAN, CLIP_STD, EncoderSpec
from pipeline.views import ResizeRule

if TYPE_CHECKING:
    from pipeline.encoders.network import EncoderNetwork

LANGUAGEBIND = EncoderSpec(
    name="languagebind",
    summary="LanguageBind video ViT-L/14: clip features aligned with language",
    model="languagebind-video",
    hub_id="LanguageBind/LanguageBind_Video_merge",
    builder="pipeline.encoders.languagebind:build",
    architecture={
        "image_size": 224,
        "patch_size": 14,
        "num_frames": 16,
        "frames_per_chunk": 8,
        "tubelet_frames": 1,
        "hidden_size": 1024,
        "num_layers": 24,
        "num_heads": 16,
        "mlp_size": 4096,
        "activation": "gelu",
        "norm_eps": 1e-5,
    },
    temporal_reach="chunk",
    # short side to 224 by torch's bilinear interpolation without antialiasing, then the centre
    resize=ResizeRule(filter="bilinear", antialias=False, fit="centre-crop"),
    mean=CLIP_MEAN,
    std=CLIP_STD,
    prefix_tokens=1,
    skipped_blocks=1,
)


def build(spec: EncoderSpec) -> EncoderNetwork:
    from pipeline.encoders.languagebind_tower import LanguageBindTower

    return LanguageBindTower(spec)
