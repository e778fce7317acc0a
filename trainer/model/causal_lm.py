"""The type of an LLM, for annotations: transformers says little of what methods return, and takes seconds to load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CausalLM(nn.Module):
    """What is called of a causal LM of transformers (`PreTrainedModel` with `GenerationMixin`)."""

    config: Any
    device: torch.device
    peft_config: dict[str, Any]  # where adapters were injected

    def get_input_embeddings(self) -> nn.Embedding:
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Linear:
        raise NotImplementedError

    def generate(self, **options: Any) -> Tensor:
        raise NotImplementedError

    def num_parameters(self) -> int:
        raise NotImplementedError

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        raise NotImplementedError
