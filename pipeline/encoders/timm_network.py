"""The network of an encoder that timm builds; see `timm_models` for the spec.

It is built at the image size of its weights, which are hashed as published; position embeddings are then resampled once
to the image size of the frames, by timm.

B batch, T frames, H W rows and columns of tokens, N all tokens, K prefix tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mervcache.errors import UserError
from pipeline.encoders.base import EncoderSpec
from pipeline.encoders.huggingface import check_same_architecture, refuse_final_norm
from pipeline.encoders.network import EncoderNetwork
from pipeline.encoders.timm_models import PREFIX, import_timm, published_config, timm_spec
from pipeline.encoders.weights import read_checkpoint

HEADS = ("head", "head_drop", "head_dist", "fc", "classifier", "global_pool", "attn_pool", "fc_norm")  # after features


class TimmNetwork(EncoderNetwork):
    """`forward_features` of a timm model, cut after the last block that is used."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
        if spec.name.startswith(PREFIX):
            _check_sizes(spec)
        self._name, sizes = spec.model.removeprefix("timm/"), spec.architecture
        self._side = sizes.get("position_grid")
        self._options = {}
        if "num_heads" in sizes:  # a spec that states all sizes, as the built-in ones do
            self._options = {"embed_dim": spec.width, "depth": sizes["num_layers"], "num_heads": sizes["num_heads"]}
            self._options |= {"patch_size": sizes["patch_size"], "mlp_ratio": sizes["mlp_size"] / spec.width}
            self._options |= {"img_size": self._side * sizes["patch_size"]}
        self.model: Any = self._trim(import_timm().create_model(self._name, num_classes=0, **self._options))

    def forward(self, pixels_BTCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.sort_tokens(self.model.forward_features(pixels_BTCHW.flatten(0, 1)), len(pixels_BTCHW))

    def sort_tokens(self, tokens: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if tokens.ndim == 4:  # a feature map
            is_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return (tokens if is_last else tokens.permute(0, 2, 3, 1)).unflatten(0, (batch, -1)), None
        prefix_XKD, patches_XPD = tokens.tensor_split([self.spec.prefix_tokens], dim=1)
        features_BTHWD = patches_XPD.unflatten(1, self.spec.grid[1:]).unflatten(0, (batch, -1))
        return features_BTHWD, prefix_XKD.unflatten(0, (batch, -1)) if self.spec.prefix_tokens else None

    @property
    def blocks(self) -> nn.Sequential | nn.ModuleList | None:
        return self.model.blocks if "num_layers" in self.spec.architecture else None

    @property
    def last_norm(self) -> nn.Module | None:
        return self.model.norm if "num_layers" in self.spec.architecture else None

    def load_published(self, folder: Path) -> None:
        expected = {"architecture": self._name, "num_features": self.spec.width}
        config = published_config(folder)
        check_same_architecture(self.spec, folder, expected, {key: config.get(key) for key in expected})
        wanted = {self.weight_name(name): name for name in self.state_dict()}
        weights = read_checkpoint(folder, wanted)
        if missing := sorted(wanted.keys() - weights.keys()):
            raise UserError(
                f"weights of {self.spec.name} in {folder} are incomplete: {len(missing)} missing, {missing[0]} first; "
                f"the published checkpoint is {self.spec.hub_id}"
            )
        state = {wanted[name]: w.float() if w.is_floating_point() else w for name, w in weights.items()}
        self.load_state_dict(state, strict=True, assign=True)

    def weight_name(self, name: str) -> str:
        return name.removeprefix("model.")

    def finish(self) -> None:
        size = self.spec.architecture["image_size"]
        is_incomplete = any(
            buffer.is_meta for buffer in self.buffers()
        )  # masks that are made on the parameters' device
        if self._side and (is_incomplete or self._side * self.spec.architecture["patch_size"] != size):
            self.model.set_input_size(img_size=size)

    def _trim(self, model: Any) -> nn.Module:
        """Drop heads, and blocks and the norm after the features' layer: neither computed nor hashed."""
        for name in HEADS:
            if isinstance(getattr(model, name, None), nn.Module):
                setattr(model, name, nn.Identity())
        has_blocks = "num_layers" in self.spec.architecture
        if not has_blocks or isinstance(model.norm, nn.Identity):
            refuse_final_norm(self.spec)
        if has_blocks:
            model.blocks = model.blocks[: self.spec.used_layers]
            model.norm = model.norm if self.spec.final_norm else nn.Identity()
        return model


def _check_sizes(spec: EncoderSpec) -> None:
    """Refuse sizes that the model of this name does not have; frames may have another size where timm resamples."""
    own = timm_spec(spec.name).architecture
    free = ("image_size", "num_frames") if "position_grid" in own or not _has_fixed_size(spec) else ("num_frames",)
    if other := [key for key in own if key not in free and own[key] != spec.architecture[key]]:
        listed = ", ".join(f"{key}={spec.architecture[key]}, there {own[key]}" for key in other)
        raise UserError(
            f"{spec.name} is a model of timm with sizes of its own ({listed}); set {' or '.join(free)} only"
        )


def _has_fixed_size(spec: EncoderSpec) -> bool:
    return bool(import_timm().get_pretrained_cfg(spec.name.removeprefix(PREFIX)).fixed_input_size)
