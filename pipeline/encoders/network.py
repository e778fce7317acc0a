"""The base class of an encoder's network: a module from normalised pixels to features, for built-in ones and plug-ins.

A builder (named by a spec) returns an `EncoderNetwork` whose parameters are still empty. Weights come either from
`load_published` or from a seed; `finish` then does once what the forward pass should not do every time.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mervcache.errors import UserError
from pipeline.encoders.base import EncoderSpec, Layer


class EncoderNetwork(nn.Module, ABC):
    """Pixels to features; a family implements the two abstract methods.

    `spec` declares the sizes that the network is built with.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, pixels_BTCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normalised `pixels_BTCHW` in the compute dtype -> (features_BTHWD, prefix_BTKD or None), time-major.

        T is the encoder's num_frames, or its still_frames; a prefix token of a whole clip is repeated at every step.
        """

    @property
    def blocks(self) -> Sequence[nn.Module] | None:
        """The computed blocks in order, each giving tokens that `sort_tokens` takes; None: layers share no forward."""
        return None

    @property
    def last_norm(self) -> nn.Module | None:
        """The norm that follows the last block, where the network has one."""
        return None

    def sort_tokens(self, tokens: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens of a block, or of the norm after it -> (features_BTHWD, prefix_BTKD or None)."""
        raise NotImplementedError

    def forward_layers(
        self, pixels_BTCHW: torch.Tensor, layers: Sequence[Layer]
    ) -> dict[Layer, tuple[torch.Tensor, torch.Tensor | None]]:
        """`forward`, which also keeps the outputs of earlier blocks: the features of several layers."""
        own = self.spec.chosen_layer
        kept: dict[int, torch.Tensor] = {}

        def keep(block: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                kept[block] = output[0] if isinstance(output, tuple) else output

            return hook

        wanted = {layer[0] for layer in layers if layer != own}
        blocks: Sequence[nn.Module] = self.blocks or ()
        hooks = [blocks[block - 1].register_forward_hook(keep(block)) for block in sorted(wanted)]
        try:
            features = {own: self(pixels_BTCHW)}
        finally:
            for hook in hooks:
                hook.remove()
        for block, has_norm in (layer for layer in layers if layer not in features):
            tokens, norm = kept[block], self.last_norm
            if has_norm:
                assert norm is not None
                tokens = norm(tokens)
            features[block, has_norm] = self.sort_tokens(tokens, len(pixels_BTCHW))
        return {layer: features[layer] for layer in layers}

    @abstractmethod
    def load_published(self, folder: Path) -> None:
        """Fill every parameter in float32 from a checkpoint folder; refuse missing weights and other architectures."""

    def weight_name(self, name: str) -> str:
        """A parameter's name in the published checkpoint: what is hashed, so that no library's renaming matters."""
        return name

    def finish(self) -> None:
        """Called once, after weights are in place and hashed; most families have nothing to prepare."""


def build_network(spec: EncoderSpec) -> EncoderNetwork:
    """Call the spec's builder: parameters without storage, buffers real, the global random state untouched."""
    from accelerate import init_empty_weights

    module_name, _, function_name = spec.builder.partition(":")
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        try:
            builder = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"builder {spec.builder!r} of {spec.name} is not a module:function: {error}") from error
        network = builder(spec)
    if not isinstance(network, EncoderNetwork):
        raise UserError(f"builder {spec.builder} of {spec.name} must return an EncoderNetwork, got {type(network)}")
    return network
