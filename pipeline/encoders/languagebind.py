"""The network of LanguageBind's video tower, written from its published description and checkpoint layout.

transformers has no such model. Module names are those of the checkpoint, CLIP's misspelt `pre_layrnorm` included, so
that its state dict loads as it is. What differs from CLIP, in each block, for frames in chunks of t:

    x <- x + temporal_embedding            [1, t, D], learned per block, added to the residual stream itself
    x <- x + TimeAttn(LN(x))               over the t frames, each of the N positions (class token too) by itself
    x <- x + SpaceAttn(LN(x)); x <- x + MLP(LN(x))

B batch, T frames, G chunks, t frames per chunk, N = 1 + H W positions, H W patch rows and columns, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from mervcache.errors import UserError
from pipeline.encoders.base import EncoderSpec
from pipeline.encoders.huggingface import check_same_architecture, refuse_final_norm
from pipeline.encoders.network import EncoderNetwork
from pipeline.encoders.weights import read_checkpoint

_ACTIVATIONS = {"gelu": functional.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


class LanguageBindTower(EncoderNetwork):
    """The vision tower under its checkpoint's name, `vision_model`."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
        refuse_final_norm(spec)
        if spec.architecture["activation"] not in _ACTIVATIONS:
            raise UserError(f"activation of {spec.name} must be one of {', '.join(_ACTIVATIONS)}")
        self.vision_model = _VisionTower(spec)

    def forward(self, pixels_BTCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.sort_tokens(self.vision_model(pixels_BTCHW.flatten(0, 1)), len(pixels_BTCHW))

    def sort_tokens(self, tokens: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_BTND = tokens.unflatten(0, (batch, -1))
        return hidden_BTND[:, :, 1:].unflatten(2, self.spec.grid[1:]), hidden_BTND[:, :, :1]

    @property
    def blocks(self) -> nn.ModuleList:
        return cast("nn.ModuleList", self.vision_model.encoder.layers)

    def load_published(self, folder: Path) -> None:
        path = folder / "config.json"
        if not path.is_file():
            raise UserError(f"{folder} has no config.json; copy it from {self.spec.hub_id}")
        config = json.loads(path.read_text())
        config = config.get("vision_config", config)
        sizes = self.spec.architecture
        expected = {
            "image_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
            "hidden_size": sizes["hidden_size"],
            "num_hidden_layers": sizes["num_layers"],
            "num_attention_heads": sizes["num_heads"],
            "intermediate_size": sizes["mlp_size"],
            "hidden_act": sizes["activation"],
            "num_frames": sizes["frames_per_chunk"],
            "add_time_attn": True,
        }
        # an absent key cannot contradict: published configs leave out what equals CLIP's defaults
        check_same_architecture(self.spec, folder, expected, {key: config.get(key, expected[key]) for key in expected})
        wanted = self.state_dict()
        found = read_checkpoint(folder, wanted)
        if missing := sorted(wanted.keys() - found.keys()):
            raise UserError(
                f"weights of {self.spec.name} in {folder} are incomplete: {len(missing)} missing, {missing[0]} first; "
                f"the checkpoint must hold merged, dense weights, as {self.spec.hub_id} does"
            )
        weights = {name: found[name].float() for name in wanted}
        self.load_state_dict(weights, strict=True, assign=True)


class _VisionTower(nn.Module):
    """Frames [(B G t), C, H, W] -> the last computed block's output [(B G t), N, D]."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.embeddings = _Embeddings(spec)
        self.pre_layrnorm = nn.LayerNorm(spec.width, eps=spec.architecture["norm_eps"])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Block(spec) for _ in range(spec.used_layers))

    def forward(self, pixels_XCHW: torch.Tensor) -> torch.Tensor:
        hidden_XND = self.pre_layrnorm(self.embeddings(pixels_XCHW))
        for block in cast("nn.ModuleList", self.encoder.layers):
            hidden_XND = block(hidden_XND)
        return hidden_XND


class _Embeddings(nn.Module):
    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        patch = spec.architecture["patch_size"]
        self.class_embedding = nn.Parameter(torch.empty(spec.width))
        self.patch_embedding = nn.Conv2d(3, spec.width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + spec.grid[1] * spec.grid[2], spec.width)

    def forward(self, pixels_XCHW: torch.Tensor) -> torch.Tensor:
        patches_XPD = self.patch_embedding(pixels_XCHW).flatten(2).transpose(1, 2)
        class_X1D = self.class_embedding.expand(patches_XPD.shape[0], 1, -1)
        return torch.cat([class_X1D, patches_XPD], dim=1) + self.position_embedding.weight


class _Block(nn.Module):
    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        sizes = spec.architecture
        width, eps, self.chunk = spec.width, sizes["norm_eps"], sizes["frames_per_chunk"]
        self.temporal_embedding = nn.Parameter(torch.empty(1, self.chunk, width))
        self.temporal_attn = _Attention(width, sizes["num_heads"])
        self.temporal_layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = _Attention(width, sizes["num_heads"])
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = _Mlp(width, sizes["mlp_size"], sizes["activation"])
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden_XND: torch.Tensor) -> torch.Tensor:
        if self.chunk > 1:  # the reference leaves time out where there is none
            positions = hidden_XND.shape[1]
            # [(B G t), N, D] -> [(B G N), t, D]: time is the sequence, positions are batch
            by_time = hidden_XND.unflatten(0, (-1, self.chunk)).transpose(1, 2).flatten(0, 1)
            by_time = by_time + self.temporal_embedding
            by_time = by_time + self.temporal_attn(self.temporal_layer_norm1(by_time))
            hidden_XND = by_time.unflatten(0, (-1, positions)).transpose(1, 2).flatten(0, 1)
        hidden_XND = hidden_XND + self.self_attn(self.layer_norm1(hidden_XND))
        return hidden_XND + self.mlp(self.layer_norm2(hidden_XND))


class _Attention(nn.Module):
    """Multi-head self-attention over axis 1, with biases, without a mask."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            project(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, mlp_size: int, activation: str) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.fc1, self.fc2 = nn.Linear(width, mlp_size), nn.Linear(mlp_size, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))
