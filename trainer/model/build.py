"""Build: a config and the shapes of the tokens -> the model and its renderer, with seeded weights.

A pretrained LLM that a run does not train is always loaded from where it came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from featurestore.clips import Sample
from mervcache.errors import UserError
from trainer.config import TrainConfig, used_encoders
from trainer.data.order import derive_seed
from trainer.data.prompts import PROMPTS, Renderer
from trainer.data.tokens import TokenShape
from trainer.model.adapt import adapt
from trainer.model.fusion import build_fusion
from trainer.model.llm import FRESH_PREFIX, LoadedLLM, load_llm
from trainer.model.projectors import build_projectors
from trainer.model.video_llm import VideoLLM


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model ready to train or to use."""

    model: VideoLLM
    llm: LoadedLLM
    renderer: Renderer
    config: TrainConfig

    @property
    def saves_llm(self) -> bool:
        """Whether the LLM's weights exist only in this run."""
        return self.llm.is_fresh or self.config.train_llm == "full"

    def autocast(self, device: torch.device | str) -> torch.autocast:
        """The precision of the run's training, for a forward of the model; tokens are fetched outside of it."""
        is_half = self.config.precision == "bf16"
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=is_half)


def build(config: TrainConfig, shapes: Mapping[str, TokenShape], llm: LoadedLLM) -> Built:
    """Projectors, fusion and LLM with seeded weights, and only what is trained wanting a gradient."""
    torch.manual_seed(derive_seed("weights", config.seed))
    width = llm.model.get_input_embeddings().weight.shape[1]
    projectors, fusion = {}, None
    if config.mode != "text-only":
        used = used_encoders(config, list(shapes))
        projectors = build_projectors(config.projector, {encoder: shapes[encoder] for encoder in used}, width)
        fusion = build_fusion(config.fusion, len(used), width)
    torch.manual_seed(derive_seed("adapters", config.seed))
    adapt(llm.model, config)
    model = VideoLLM(llm.model, projectors, fusion, exceeds_context=_exceeds_context(config, llm))
    renderer = Renderer(
        config.prompt, llm.tokenizer, position=config.visual_position, max_tokens=_text_limit(config, model)
    )
    return Built(model=model, llm=llm, renderer=renderer, config=config)


def _exceeds_context(config: TrainConfig, llm: LoadedLLM) -> bool:
    """Rotary positions go on behind the context, a table of learned ones ends there."""
    if config.exceed_context and not getattr(llm.model.config, "rope_parameters", None):
        raise UserError(
            f"exceed_context: true wants rotary positions, and {config.llm} has others; choose another"
            " LLM, or a fusion or projector with fewer visual tokens"
        )
    return config.exceed_context


def _text_limit(config: TrainConfig, model: VideoLLM) -> int:
    """Tokens of a text: one limit for all of a run, whether a clip stands beside them or not."""
    room = config.max_text_tokens if model.context is None else model.context - model.num_visual_tokens
    return max(1, min(config.max_text_tokens, room))


def new_llm(config: TrainConfig, samples: Iterable[Sample], words: Iterable[str] = ()) -> LoadedLLM:
    """The LLM a run starts from; a fresh one knows the words of the samples, and `words`."""
    torch.manual_seed(derive_seed("llm", config.seed))
    texts = chain(texts_of(config, samples), words) if config.llm.startswith(FRESH_PREFIX) else ()
    return load_llm(config.llm, texts=texts, dtype=llm_dtype(config), quant=config.llm_quant)


def llm_dtype(config: TrainConfig) -> torch.dtype:
    """Weights that are not trained need no fp32 master copy; LoRA adapters are fp32 beside them."""
    return torch.bfloat16 if config.precision == "bf16" and config.train_llm != "full" else torch.float32


def trained_encoders(config: TrainConfig, trained: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """The encoders that join the model: those the config names, which only a source that runs them can give."""
    if missing := [encoder for encoder in config.train_encoders if encoder not in trained]:
        raise UserError(
            f"train_encoders names {', '.join(missing)}, but a store holds tokens, not frames: train with --end-to-end,"
            " or leave train_encoders empty; with frozen encoders the cache is exact"
        )
    return {encoder: trained[encoder] for encoder in config.train_encoders}


def count_parameters(model: VideoLLM) -> dict[str, dict[str, int]]:
    """Part -> total and trained parameters."""
    parts = {"projectors": model.projectors, "fusion": model.fusion, "llm": model.llm}
    if model.trained_names:
        parts["encoders"] = model.trained_encoders
    return {
        name: {
            "total": sum(p.numel() for p in part.parameters()),
            "trained": sum(p.numel() for p in part.parameters() if p.requires_grad),
        }
        for name, part in parts.items()
        if part is not None
    }


def texts_of(config: TrainConfig, samples: Iterable[Sample]) -> Iterable[str]:
    """All that a fresh tokenizer must know: rendered turns, and the options of the questions."""
    if config.prompt == "chat_template":
        raise UserError(f"{config.llm} has no chat template; choose another prompt")
    for sample in samples:
        yield from (piece.text for piece in PROMPTS[config.prompt](sample.turns, None))
        yield from sample.options
