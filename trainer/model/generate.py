"""Greedy answers to open questions, in batches, with the LLM's own `generate` and its cache of keys and values."""

from __future__ import annotations

import torch

from mervcache.errors import UserError
from trainer.data.batches import Batch
from trainer.model.video_llm import Built


def generate_texts(built: Built, batch: Batch, *, max_new_tokens: int, device: torch.device | str) -> list[str | None]:
    """The text behind each open question, without special tokens and blanks at its ends; at most `max_new_tokens`.

    None where the LLM's output is not finite. Raises UserError where the questions leave no room in the context.
    """
    tokenizer = built.renderer.tokenizer
    with built.autocast(device):
        output = built.model.generate(
            batch.to(device),
            max_new_tokens=_num_new_tokens(built, max_new_tokens, batch.attention_mask_BS.shape[1]),
            do_sample=False,
            use_cache=True,
            eos_token_id=list(built.renderer.end_ids),
            pad_token_id=tokenizer.eos_token_id,  # a padding token of its own may have no embedding
            return_dict_in_generate=True,
            output_logits=True,
        )
    texts = tokenizer.batch_decode(output.sequences.tolist(), skip_special_tokens=True)
    is_finite_B = torch.stack([logits_BV.amax(-1).isfinite() for logits_BV in output.logits]).all(0).tolist()
    return [text.strip() if is_finite else None for text, is_finite in zip(texts, is_finite_B, strict=True)]


def _num_new_tokens(built: Built, wanted: int, used: int) -> int:
    """New tokens that still fit after the prompt."""
    context = built.model.context
    if context is not None and used >= context:
        raise UserError(f"the question and the visual tokens fill the LLM's context of {context}; ask a shorter one")
    return wanted if context is None else min(wanted, context - used)
