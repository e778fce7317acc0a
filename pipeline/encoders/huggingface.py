"""Vision models of transformers as encoders: what all families share.

A family passes its model class and its sizes under that class's config names; this module cuts the blocks that the
features do not need, loads checkpoints, and sorts tokens into a grid. A checkpoint is refused if it lacks a weight or
if its config.json describes another architecture: heads, activation and epsilon do not show in shapes.

B batch, T time steps, H W patch rows and columns, N all tokens, K prefix tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mervcache.errors import UserError
from pipeline.encoders.base import EncoderSpec
from pipeline.encoders.network import EncoderNetwork


class HuggingFaceNetwork(EncoderNetwork):
    """A transformers vision model whose `last_hidden_state` holds the features."""

    def __init__(
        self,
        spec: EncoderSpec,
        model_class: type,
        config_class: type,
        sizes: Mapping[str, Any],  # config values that a checkpoint's config.json must agree with
        *,
        choices: Mapping[str, Any] | None = None,  # config values that a checkpoint need not agree with
        model_options: Mapping[str, Any] | None = None,  # keyword arguments of the model class
        call_options: Mapping[str, Any] | None = None,  # keyword arguments of each call
        final_norm: str | None = "layernorm",  # attribute of the last LayerNorm, if it takes all tokens
        blocks: str | None = None,  # attribute of the list of blocks; None: several layers share no forward
        unused: tuple[str, ...] = (),  # parameters and modules that do not touch the features
        published_names: Mapping[str, str] | None = None,  # regular expressions: library's name -> checkpoint's
        finish: Callable[[nn.Module], None] | None = None,
        part: str | None = None,  # the name under which a checkpoint of a larger model holds this one: "backbone"
    ) -> None:
        super().__init__(spec)
        if final_norm is None:
            refuse_final_norm(spec)
        self._model_class, self._options = model_class, dict(model_options or {})
        self._call_options = dict(call_options or {})
        self._sizes = {
            "hidden_size": spec.width,
            "num_attention_heads": spec.architecture["num_heads"],
            "hidden_act": spec.architecture["activation"],
            "layer_norm_eps": spec.architecture["norm_eps"],
            **sizes,
        }
        self._choices = dict(choices or {})
        values = {**self._sizes, **self._choices, "num_hidden_layers": spec.used_layers}
        self._config = config_class(**values, attn_implementation="sdpa")
        self._final_norm, self._blocks, self._unused = final_norm, blocks, unused
        self._published_names, self._finish, self._part = dict(published_names or {}), finish, part
        self.model = self._trim(model_class(self._config, **self._options))

    def forward(self, pixels_BTCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_image = self.spec.temporal_reach == "frame"
        pixels = pixels_BTCHW.flatten(0, 1) if is_image else pixels_BTCHW
        return self.sort_tokens(self.model(pixels, **self._call_options).last_hidden_state, len(pixels_BTCHW))

    def sort_tokens(self, tokens: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        height, width = self.spec.grid[1:]
        if self.spec.temporal_reach == "frame":
            tokens_BTND = tokens.unflatten(0, (batch, -1))  # [(B T), K + H W, D]
            prefix_BTKD, patches_BTPD = tokens_BTND.tensor_split([self.spec.prefix_tokens], dim=2)
            features_BTHWD = patches_BTPD.unflatten(2, (height, width))
        else:  # [B, K + T H W, D]
            prefix_BKD, patches_BPD = tokens.tensor_split([self.spec.prefix_tokens], dim=1)
            features_BTHWD = patches_BPD.unflatten(1, (-1, height, width))
            prefix_BTKD = prefix_BKD.unsqueeze(1).expand(-1, features_BTHWD.shape[1], -1, -1)
        return features_BTHWD, prefix_BTKD if self.spec.prefix_tokens else None

    @property
    def blocks(self) -> Sequence[nn.Module] | None:
        return tuple(self.model.get_submodule(self._blocks).children()) if self._blocks else None

    @property
    def last_norm(self) -> nn.Module | None:
        return self.model.get_submodule(self._final_norm) if self._final_norm else None

    def load_published(self, folder: Path) -> None:
        published = self._published_config(folder)
        expected = {**self._sizes, "num_hidden_layers": self.spec.architecture["num_layers"]}
        expected = {key: value for key, value in expected.items() if key not in self._choices}
        found = {key: getattr(published, key, None) for key in expected}
        check_same_architecture(self.spec, folder, expected, found)
        with _quiet_transformers():
            model, report = self._model_class.from_pretrained(
                folder,
                config=self._config,
                dtype=torch.float32,
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
                key_mapping={rf"^{self._part}\.": ""} if self._part else None,
                **self._options,
            )
        self.model = self._trim(model)
        if missing := sorted(set(report["missing_keys"]) & set(self.model.state_dict())):
            raise UserError(
                f"weights of {self.spec.name} in {folder} are incomplete: {len(missing)} missing, {missing[0]} first; "
                f"the published checkpoint is {self.spec.hub_id}"
            )

    def _published_config(self, folder: Path) -> Any:
        if not self._part:
            return type(self._config).from_pretrained(folder, local_files_only=True)
        from transformers import AutoConfig

        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return getattr(whole, f"{self._part}_config", None)

    def weight_name(self, name: str) -> str:
        published = name.removeprefix("model.")
        for pattern, replacement in self._published_names.items():
            published = re.sub(pattern, replacement, published)
        return f"{self._part}.{published}" if self._part else published

    def finish(self) -> None:
        if self._finish:
            self._finish(self.model)

    def _trim(self, model: nn.Module) -> nn.Module:
        """Drop what is not computed, so that it is neither hashed nor moved to the device."""
        norm = () if self.spec.final_norm or self._final_norm is None else (self._final_norm,)
        for name in (*self._unused, *norm):
            owner_name, _, attribute = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            setattr(owner, attribute, nn.Identity() if isinstance(getattr(owner, attribute), nn.Module) else None)
        return model


def refuse_final_norm(spec: EncoderSpec) -> None:
    """For families whose last LayerNorm only ever saw a class token or a mean: on patches it was not trained."""
    if spec.final_norm:
        raise UserError(f"{spec.name} has no final norm over its patch tokens; leave final_norm out")


def check_same_architecture(
    spec: EncoderSpec, folder: Path, expected: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint whose config.json differs from the spec; the error lists every difference."""
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    if differing := [key for key in expected if plain[key] != expected[key]]:
        listed = "; ".join(f"{key} is {plain[key]!r} there, {expected[key]!r} here" for key in differing)
        raise UserError(
            f"{folder} holds another architecture than {spec.name}: {listed}. Set the encoder's architecture to the "
            f"checkpoint's, or use the weights of {spec.hub_id}"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the table of unused weights (text towers, cut blocks) and the progress bar."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
