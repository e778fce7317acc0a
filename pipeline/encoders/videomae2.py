"""VideoMAE v2's checkpoints, in the layout of the authors' code, for transformers' VideoMAE.

    model.patch_embed.proj, model.blocks.N.{norm1, attn.{qkv.weight, q_bias, v_bias, proj}, norm2, mlp.{fc1, fc2}}

with or without `model.`; keys have no bias, positions are a fixed sine table. What follows the blocks norms the mean of
all tokens and is not used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mervcache.errors import UserError
from pipeline.encoders.base import EncoderSpec
from pipeline.encoders.huggingface import check_same_architecture
from pipeline.encoders.network import EncoderNetwork
from pipeline.encoders.weights import read_checkpoint

NAMES = {  # VideoMAE's names of a block -> the checkpoint's
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
    "attention.output.dense.": "attn.proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
}
PARTS = ("query", "key", "value")  # rows of the fused matrix, in this order


class VideoMAE2Network(EncoderNetwork):
    """VideoMAE's network, filled from the authors' layout."""

    def __init__(self, spec: EncoderSpec, videomae: EncoderNetwork) -> None:
        super().__init__(spec)
        self.videomae = videomae

    def forward(self, pixels_BTCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.videomae(pixels_BTCHW)

    @property
    def blocks(self) -> Sequence[nn.Module] | None:
        return self.videomae.blocks

    def sort_tokens(self, tokens: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.videomae.sort_tokens(tokens, batch)

    def weight_name(self, name: str) -> str:
        return self.videomae.weight_name(name.removeprefix("videomae."))

    def load_published(self, folder: Path) -> None:
        self._check_config(folder)
        names = {name: self._sources(name) for name in self.state_dict()}
        wanted = {source for source, _ in names.values()}
        prefixed = read_checkpoint(folder, {f"model.{source}" for source in wanted})
        found = {name.removeprefix("model."): tensor for name, tensor in prefixed.items()}
        found = found or read_checkpoint(folder, wanted)
        if missing := sorted(wanted - found.keys()):
            raise UserError(
                f"weights of {self.spec.name} in {folder} are incomplete: {len(missing)} missing, {missing[0]} first; "
                f"the published checkpoint is {self.spec.hub_id}"
            )
        rows = self.spec.width
        state = {
            name: (found[source] if part is None else found[source][part * rows : (part + 1) * rows]).float()
            for name, (source, part) in names.items()
        }
        self.load_state_dict(state, strict=True, assign=True)

    def _sources(self, name: str) -> tuple[str, int | None]:
        """The checkpoint's tensor of a parameter, and which third of its rows."""
        name = name.removeprefix("videomae.model.")
        block = re.match(r"encoder\.layer\.(\d+)\.(.+)", name)
        prefix, rest = (f"blocks.{block[1]}.", block[2]) if block else ("", name)
        for part, projection in enumerate(PARTS):
            if rest == f"attention.attention.{projection}.weight":
                return f"{prefix}attn.qkv.weight", part
        for own, published in NAMES.items():
            if rest.startswith(own):
                return prefix + published + rest.removeprefix(own), None
        raise UserError(f"{self.spec.name}: this version of transformers has a weight {name} in VideoMAE")

    def _check_config(self, folder: Path) -> None:
        path, sizes = folder / "config.json", self.spec.architecture
        if not path.is_file():
            raise UserError(f"{folder} has no config.json; copy it from {self.spec.hub_id}")
        config = json.loads(path.read_text())
        config = config.get("model_config", config)
        expected = {
            "img_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
            "embed_dim": sizes["hidden_size"],
            "depth": sizes["num_layers"],
            "num_heads": sizes["num_heads"],
            "mlp_ratio": sizes["mlp_size"] / sizes["hidden_size"],
            "layer_norm_eps": sizes["norm_eps"],
            "tubelet_size": sizes["tubelet_frames"],
            "cos_attn": False,
            "use_learnable_pos_emb": False,
            "init_values": 0.0,
        }
        check_same_architecture(self.spec, folder, expected, {key: config.get(key, expected[key]) for key in expected})
