"""Greedy answers to open questions, in batches, with the LLM's own `generate` and its cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mervcache.errors import UserError
from trainer.data.collate import Batch
from trainer.model.video_llm import Built


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What the LLM wrote behind one question."""

    text: str  # without special tokens and blanks at its ends
    is_finished: bool  # False: it was cut where the new tokens ended


def generate(built: Built, batch: Batch, *, max_new_tokens: int, device: torch.device | str) -> list[Generated | None]:
    """Greedy answers of at most `max_new_tokens`; None where the LLM's output is not finite.

    Raises UserError where the questions leave no room in the context.
    """
    tokenizer, ends = built.renderer.tokenizer, set(built.renderer.end_ids)
    check = _FiniteCheck()
    with built.autocast(device):
        sequences_BL = built.model.generate(
            batch.to(device),
            max_new_tokens=_num_new_tokens(built, max_new_tokens, batch.attention_mask_BS.shape[1]),
            do_sample=False,
            use_cache=True,
            eos_token_id=list(built.renderer.end_ids),
            pad_token_id=tokenizer.eos_token_id,  # a padding token of its own may have no embedding
            logits_processor=LogitsProcessorList([check]),
        )
    assert check.is_finite_B is not None
    rows = sequences_BL.tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [
        Generated(text=text.strip(), is_finished=not ends.isdisjoint(row)) if is_finite else None
        for row, text, is_finite in zip(rows, texts, check.is_finite_B.tolist(), strict=True)
    ]


def generate_texts(built: Built, batch: Batch, *, max_new_tokens: int, device: torch.device | str) -> list[str | None]:
    """The texts of `generate`."""
    return [found and found.text for found in generate(built, batch, max_new_tokens=max_new_tokens, device=device)]


class _FiniteCheck(LogitsProcessor):
    """Finds the rows whose output is finite at every step.

    The logits of 512 steps of 16 answers are 1 GB for a vocabulary of 32,000, so none are kept.
    """

    def __init__(self) -> None:
        self.is_finite_B: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_finite_B = scores.amax(-1).isfinite()
        self.is_finite_B = is_finite_B if self.is_finite_B is None else self.is_finite_B & is_finite_B
        return scores


def _num_new_tokens(built: Built, wanted: int, used: int) -> int:
    """New tokens that still fit after the prompt."""
    context = built.model.context
    if context is not None and used >= context:
        raise UserError(f"the question and the visual tokens fill the LLM's context of {context}; ask a shorter one")
    return wanted if context is None else min(wanted, context - used)
