"""Memory: what one process of a run will hold on its device, by part, before anything is trained.

Comes in: a model, the shapes of its tokens and the longest text. Goes out: bytes by part. Parameters, gradients and
moments are counted, tokens follow from the grids, activations are a rough formula that is said beside the number: it is
there to tell 10 GB from 100 GB, not 10 from 11. Under FSDP parameters, gradients and moments are divided by the number
of processes.

B samples of a micro-batch, S sequence length, N visual tokens, M LLM width, L text length, V vocabulary, E encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import nn

from trainer.config import TrainConfig
from trainer.data.tokens import TokenShape
from trainer.model.build import Built

NUM_MOMENTS = 2  # AdamW's
FLOAT_BYTES = 4
# arXiv 2205.05198, table 2: a layer keeps 34 bytes per position and channel in 16 bits, without the matrix of attention
# scores, which fused attention does not keep; with checkpointing 2, and the whole of the layer that is being redone.
LAYER_BYTES, CHECKPOINT_BYTES = 34, 2
FORMULA = (
    "{layers} B S M + 4 x 3 B L V + 4 x 2 B E N M bytes; B {B}, S {S}, M {M}, L {L}, V {V}, E {E}, N {N}"
    " (layers as arXiv 2205.05198, table 2; logits, their gradient and a copy; visual tokens before and behind fusion)"
)


def memory_by_part(built: Built, shapes: Mapping[str, TokenShape], longest_text: int) -> dict[str, Any]:
    """Bytes by part, their sum, and the formula of the activations."""
    model = built.model
    trained = [p for p in model.parameters() if p.requires_grad]
    activations, formula = _activations(built, longest_text)
    parts = {
        "parameters": sum(_bytes(p) for p in model.parameters()),
        "gradients": sum(_bytes(p) for p in trained),
        "moments": NUM_MOMENTS * sum(_bytes(p) for p in trained),
        "tokens": _tokens(built.config, shapes),
        "activations": activations,
    }
    return {**parts, "total": sum(parts.values()), "activations_formula": formula}


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _tokens(config: TrainConfig, shapes: Mapping[str, TokenShape]) -> int:
    """Tokens of a micro-batch in which every sample has a clip of its own; projectors read them in float32."""
    per_clip = sum((prod(shape.grid) + shape.grid[0] * shape.num_prefix) * shape.width for shape in shapes.values())
    return config.micro_batch_size * per_clip * FLOAT_BYTES


def _activations(built: Built, longest_text: int) -> tuple[int, str]:
    config, llm = built.config, built.model.llm
    size = {
        "B": config.micro_batch_size,
        "S": longest_text + built.model.num_visual_tokens,
        "M": llm.get_input_embeddings().weight.shape[1],
        "L": longest_text,
        "V": llm.config.vocab_size,
        "E": len(built.model.projectors),
        "N": built.model.num_visual_tokens,
    }
    scale = 1 if config.precision == "bf16" else 2  # the paper's figures are for 16 bits
    num_layers = llm.config.num_hidden_layers
    per_layer = CHECKPOINT_BYTES if config.activation_checkpointing else LAYER_BYTES
    layers = scale * (per_layer * num_layers + (LAYER_BYTES if config.activation_checkpointing else 0))
    b, m = size["B"], size["M"]
    in_layers = layers * b * size["S"] * m
    logits = FLOAT_BYTES * 3 * b * size["L"] * size["V"]
    visual = FLOAT_BYTES * 2 * b * size["E"] * size["N"] * m
    return in_layers + logits + visual, FORMULA.format(layers=layers, **size)
