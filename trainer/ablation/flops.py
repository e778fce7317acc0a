"""Parameters, multiply-adds and FLOPs of a model's forward pass, counted by torch from shapes alone.

The forward runs on fake tensors: no weight is read and none is allocated. torch's counter has no formula for the fused
attention kernel of CPUs and would leave its products out, so attention is decomposed into its matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mervcache.errors import UserError
from trainer.config import TrainConfig, read_config
from trainer.data.tokens import ClipTokens, Part, PrefixedTokens, TokenShape
from trainer.model.causal_lm import CausalLM
from trainer.model.llm import LoadedLLM, holds_shape, hub_options, load_saved_shape, reason_not_loaded
from trainer.model.video_llm import Built, build
from trainer.runs.run_record import RunRecord, read_metrics
from trainer.runs.stage_folders import LLM_FOLDER, last_stage

NOT_COUNTED = (
    "Counted are matrix products, convolutions and both products of attention (the whole square, also where a mask"
    " hides half of it) of one forward of one sample. Not counted: element-wise operations (the weighted sum of a"
    " fusion, activation functions, residual sums), norms, softmax, pooling, products of a matrix with one vector,"
    " embedding look-ups, and the backward pass."
)
_ATTENTION = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)  # what decomposed attention is made of


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one forward of one sample costs; `NOT_COUNTED` says what is left out."""

    parameters: int  # all, trained or not
    macs: int  # multiply-adds
    flops: int  # two per multiply-add
    visual_tokens: int  # that enter the LLM


@dataclass(frozen=True, kw_only=True)
class MultiplyAdds:
    """Multiply-adds of a call: all of them, and those of attention's scores and of mixing its values."""

    total: int
    attention: int


def count(built: Built, shapes: Mapping[str, TokenShape], text_tokens: int) -> Cost:
    """Cost of projectors, fusion and LLM for a clip with so many text tokens; the output layer runs at every position.

    Encoders are left out, also those that are trained with the rest: `shapes` are those of their tokens.
    """
    if built.config.llm_quant is not None:
        raise UserError(
            f"the LLM is held as {built.config.llm_quant}, whose packed weights torch cannot count; count the same"
            " settings without llm_quant: quantisation changes no multiply-add"
        )
    model, llm = built.model, built.model.llm
    weight = llm.get_input_embeddings().weight

    def forward() -> None:
        length = text_tokens
        if model.has_visual:
            with torch.device(weight.device):
                projected = [
                    projector(empty_tokens(shapes[encoder], projector.resampler.reads))
                    for encoder, projector in zip(model.encoders, model.projectors, strict=True)
                ]
            length += model.fuse(projected)[0].shape[1]
        run_llm(llm, length)

    parts = [*model.projectors, llm, *([] if model.fusion is None else [model.fusion])]
    macs = multiply_adds(forward).total
    return Cost(parameters=num_parameters(*parts), macs=macs, flops=2 * macs, visual_tokens=model.num_visual_tokens)


def run_llm(llm: CausalLM, length: int) -> None:
    """A forward of a causal LM over a sequence of that length, with logits at every position."""
    weight = llm.get_input_embeddings().weight
    llm(
        inputs_embeds=torch.empty(1, length, weight.shape[1], dtype=weight.dtype, device=weight.device), use_cache=False
    )


def empty_tokens(shape: TokenShape, reads: tuple[Part, ...] = ("tokens",)) -> ClipTokens:
    """Tokens of one clip as a projector that reads these parts gets them, without values."""
    grid = torch.empty(1, *shape.grid, shape.width)
    if "prefix" not in reads:
        return grid
    prefix = torch.empty(1, shape.grid[0], shape.num_prefix, shape.width)
    return PrefixedTokens(tokens_BTHWD=grid if "tokens" in reads else None, prefix_BTKD=prefix)


def multiply_adds(call: Callable[[], object]) -> MultiplyAdds:
    """Multiply-adds of what `call` computes; the tensors that it makes are fake."""
    with (
        torch.enable_grad(),  # without gradients the counter stumbles over views of parameters
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        call()
    flops = counter.get_flop_counts().get("Global", {})
    attention = sum(number for operator, number in flops.items() if operator in _ATTENTION)
    return MultiplyAdds(total=sum(flops.values()) // 2, attention=attention // 2)


def num_parameters(*modules: nn.Module) -> int:
    """Parameters of the modules; one that several layers share counts once."""
    return sum(parameter.numel() for parameter in nn.ModuleList(modules).parameters())


def run_cost(run: Path, text_tokens: int, *, tokens_per_frame: int | None = None) -> Cost:
    """Cost of one forward of a run's model for a clip with so many text tokens; frozen encoders are left out.

    `tokens_per_frame` is one of the nested grids of a run that has such. Raises UserError where the LLM's sizes cannot
    be read.
    """
    folder = last_stage(run)
    config, record = read_config(folder), RunRecord.read(folder)
    if config.train_encoders:
        raise UserError(f"{run} trains encoders, which are not counted")
    if tokens_per_frame is not None:
        assert config.projector.grid is not None
        time, side = config.projector.grid[0], isqrt(tokens_per_frame)
        config = replace(config, projector=replace(config.projector, nested_grids=(), grid=(time, side, side)))
    llm = llm_without_weights(config, folder / LLM_FOLDER)
    with torch.device("meta"):
        built = build(replace(config, activation_checkpointing=False), record.shapes, llm)
    return count(built, record.shapes, text_tokens)


def llm_without_weights(config: TrainConfig, saved: Path) -> LoadedLLM:
    """A run's LLM on the meta device: sizes as the run saved them in `saved`, else as they are published."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with torch.device("meta"):
        if holds_shape(saved):
            return load_saved_shape(saved)
        try:
            sizes = AutoConfig.from_pretrained(config.llm, trust_remote_code=False, **hub_options(config.llm))
            model = AutoModelForCausalLM.from_config(sizes, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"the sizes of LLM {config.llm} cannot be read: {reason_not_loaded(error)}") from error
    return LoadedLLM(model=model, tokenizer=tokenizer, is_fresh=False)


def mean_text_tokens(runs: Iterable[Path]) -> int | None:
    """Mean text tokens of a training sample by the runs' metrics, rounded; None where none of them has any.

    Text-only runs are preferred: in others, samples without a clip have no visual tokens, which the metrics do not
    tell apart.
    """
    found: list[tuple[int, int]] = []
    for run in map(last_stage, runs):
        rows = [row for row in read_metrics(run) if row.get("tokens") and row.get("samples")]
        if rows:
            visual = RunRecord.read(run).num_visual_tokens
            mean = sum(row["tokens"] for row in rows) / sum(row["samples"] for row in rows)
            found.append((visual, max(1, round(mean - visual))))
            if visual == 0:
                break
    return min(found)[1] if found else None
