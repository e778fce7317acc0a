"""One training step of projectors and fusion under a frozen LLM of LLaMA-2-7B's shapes: seconds and peak memory.

Used by gpu_check.py. Weights are seeded and made on the device, so nothing is downloaded; arithmetic and memory do not
depend on their values. The step is the training loop's: bf16 products, fp32 weights of projectors and fusion, AdamW.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.encoders import MERV_ENCODERS, encoder_spec
from trainer.config import TrainConfig
from trainer.data.collate import Batch, collate
from trainer.data.prompts import IGNORE_INDEX, Rendered
from trainer.data.tokens import TokenShape
from trainer.loop.optimizer import build_optimizer, set_rates
from trainer.model.llm import LoadedLLM, word_tokenizer
from trainer.model.video_llm import Built, build, count_parameters

SEED = 0
ANSWER_SHARE = 0.25  # of the text tokens


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Shapes of the LLM, of the tokens and of the text."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    vocabulary: int = 32000
    grid: tuple[int, int, int] = (16, 8, 8)  # 1,024 visual tokens
    widths: dict[str, int]  # encoder -> D
    text_tokens: int = 128


LLAMA2_7B = StepSize(widths={name: encoder_spec(name).width for name in MERV_ENCODERS})
TOY = StepSize(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    vocabulary=100,
    grid=(4, 2, 2),
    widths=dict.fromkeys(MERV_ENCODERS, 8),
    text_tokens=16,
)


def frozen_step(size: StepSize, device: str, *, micro_batch: int, checkpointing: bool, repeats: int) -> dict[str, Any]:
    """Median seconds of a step and the peak memory; where memory runs out, that is the figure."""
    row = {"micro batch": micro_batch, "activation checkpointing": checkpointing, "text tokens": size.text_tokens}
    try:
        built = seeded_model(size, device, checkpointing)
        return row | count(built) | timed(built, batch_of(size, built, micro_batch).to(device), device, repeats)
    except torch.OutOfMemoryError as error:
        return row | {"out of memory": str(error).splitlines()[0]}
    finally:
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def seeded_model(size: StepSize, device: str, checkpointing: bool) -> Built:
    """Projectors, fusion and a frozen bf16 Llama on the device, as `trainer.model.video_llm` puts them together."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(SEED)
    sizes = LlamaConfig(
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16, trust_remote_code=False)
    llm = LoadedLLM(model=model, tokenizer=word_tokenizer(["a"]), is_fresh=False)
    shapes = {
        name: TokenShape(grid=size.grid, width=width, is_pooled=True, identity="seeded")
        for name, width in size.widths.items()
    }
    built = build(TrainConfig(activation_checkpointing=checkpointing, precision="bf16"), shapes, llm)
    built.model.to(device)
    return built


def batch_of(size: StepSize, built: Built, micro_batch: int) -> Batch:
    """Random text with an answer at its end, each sample with a clip of its own."""
    random = torch.Generator().manual_seed(SEED)
    start = round(size.text_tokens * (1 - ANSWER_SHARE))
    ids = torch.randint(3, size.vocabulary, (micro_batch, size.text_tokens), generator=random).tolist()
    rendered = [
        Rendered(input_ids=(1, *row[1:]), labels=(*[IGNORE_INDEX] * start, *row[start:]), visual_at=1) for row in ids
    ]
    tokens = {
        name: torch.randn(micro_batch, *size.grid, width, generator=random).half()
        for name, width in size.widths.items()
    }
    count = built.model.num_visual_tokens
    return collate(rendered, range(micro_batch), tokens, num_visual_tokens=count, context=built.model.context)


def timed(built: Built, batch: Batch, device: str, repeats: int) -> dict[str, Any]:
    """One step to warm up, then `repeats` that count."""
    model, config = built.model, built.config
    optimizer = build_optimizer(model, config.optimizer)
    set_rates(optimizer, 0, 1, config.optimizer)
    model.train()
    seconds, loss = [], float("nan")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats + 1):
        began = _now(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            total = model(batch) / batch.num_supervised
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(_now(device) - began)
        loss = float(total.detach())
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else None
    median_s = sorted(seconds[1:])[repeats // 2]
    return {
        "seconds per step": median_s,
        "samples/s": len(batch.lengths) / median_s,
        "peak memory (GB)": peak,
        "loss": loss,
    }


def count(built: Built) -> dict[str, int]:
    parts = count_parameters(built.model).values()
    return {
        "visual tokens": built.model.num_visual_tokens,
        "parameters": sum(part["total"] for part in parts),
        "trained": sum(part["trained"] for part in parts),
    }


def _now(device: str) -> float:
    """The clock, once the device has done all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
