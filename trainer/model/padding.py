"""What an LLM makes of right padding, measured on its own weights when a model is built.

Of a right-padded batch a causal LLM needs no attention mask: no real position reads a padded one, and padded positions
carry no label. Without a mask, scaled dot-product attention runs its causal kernel (flash attention on a GPU). Whether
an LLM is such a one is measured, not looked up by its name: `without_mask` runs it on a few tokens.

Two kinds of LLM would make a sample's loss depend on the padding of its batch, so they are settled once for a run, by
the length of its longest sequence: sliding windows, whose kernel changes where a batch reaches the window, and rotary
positions that are rescaled by the longest position of the batch (`dynamic` and `longrope`).

B samples, S positions, M LLM width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.model.causal_lm import CausalLM

LENGTH, SHORTER = 12, 7  # positions of the measured batch: of its first sample, and of its second before the padding
# Largest difference of a logit, as a share of the largest one, between kernels with a mask and without. In fp32 it is
# zero with as many heads of keys as of queries, and rounding (1e-7) with fewer.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KIND = "unpinned_rope_type"  # attribute of a pinned module: an LLM may serve several runs
RESCALED = ("dynamic", "longrope")  # kinds of rotary positions, by transformers' names, that read the batch's length
WINDOWS = ("sliding_window", "attention_chunk_size")  # settings of an LLM, by transformers' names


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How a run's batches are given to its LLM."""

    keeps_mask: bool
    reason: str  # of a mask that is kept; empty where none is needed
    rotary_length: int | None = None  # the length by which rescaled rotary positions are computed; None: no such ones


def settle_padding(llm: CausalLM, longest: int) -> Padding:
    """Measure the LLM, and compute rescaled rotary positions for sequences of up to `longest`, in place."""
    rotary_length = longest if pin_rotary(llm, longest) else None
    reason = _reason_to_keep(llm, longest)
    return Padding(keeps_mask=bool(reason), reason=reason, rotary_length=rotary_length)


def pin_rotary(llm: CausalLM, length: int) -> bool:
    """Fix rotary positions that transformers rescales by the longest position of each batch, to those of `length`.

    Returns whether there are any. Up to the length that an LLM was first trained with they are its unscaled ones.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    is_pinned = False
    for module in cast("Iterable[Any]", llm.modules()):
        kinds = getattr(module, KIND, getattr(module, "rope_type", None))
        named = kinds if isinstance(kinds, Mapping) else {None: kinds}  # by type of layer, where there are several
        rescaled = {layer: kind for layer, kind in named.items() if kind in RESCALED}
        for layer, kind in rescaled.items():
            prefix, options = ("", {}) if layer is None else (f"{layer}_", {"layer_type": layer})
            before = getattr(module, f"{prefix}inv_freq")
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, before.device, seq_len=length, **options)
            before.copy_(frequencies)
            setattr(module, f"{prefix}attention_scaling", scaling)
            is_pinned = True
        if rescaled:  # transformers leaves what it calls default as it is
            setattr(module, KIND, kinds)
            module.rope_type = "default" if None in rescaled else {**named, **dict.fromkeys(rescaled, "default")}
    return is_pinned


def _reason_to_keep(llm: CausalLM, longest: int) -> str:
    text_config = llm.config.get_text_config() if hasattr(llm.config, "get_text_config") else llm.config
    for name in WINDOWS:
        window = getattr(text_config, name, None)
        if window is not None and longest >= window:
            return f"the LLM's {name} of {window} is within reach of sequences of up to {longest}"
    if not without_mask(llm):
        return "the LLM's outputs depend on the mask or on later positions"
    return ""


@torch.no_grad()
def without_mask(llm: CausalLM) -> bool:
    """Whether a right-padded batch without an attention mask has the same logits at all real positions.

    They must be those with a mask, within `TOLERANCE`, and must not change with what stands at later positions: by less
    than a tenth of it, since a mixture of experts sums in an order that follows from the whole batch. Random numbers
    and modes of the modules are left as they were.
    """
    table = llm.get_input_embeddings().weight
    tolerance = TOLERANCE.get(table.dtype)
    if table.device.type == "meta" or tolerance is None:
        return False
    random = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(table.shape[0], (2, LENGTH), generator=random)
    other_BS = torch.randint(table.shape[0], (2, LENGTH), generator=random)
    is_real_BS = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [SHORTER]])
    is_early_BS = torch.arange(LENGTH)[None] < torch.tensor([[SHORTER], [SHORTER]])
    real, early = is_real_BS.to(table.device)[..., None], is_early_BS.to(table.device)[..., None]
    with evaluating(llm):
        embed = llm.get_input_embeddings()
        embeddings_BSM = embed(ids_BS.to(table.device)) * real
        masked_BSV = _logits(llm, embeddings_BSM, is_real_BS.long().to(table.device))
        plain_BSV = _logits(llm, embeddings_BSM)
        changed_BSV = _logits(llm, torch.where(early, embeddings_BSM, embed(other_BS.to(table.device))))
    allowed = tolerance * (masked_BSV * real).abs().max()
    by_mask = ((plain_BSV - masked_BSV) * real).abs().max()
    by_later = ((plain_BSV - changed_BSV) * early).abs().max()
    return bool((by_mask <= allowed) & (by_later <= allowed / 10))  # False where a number is not finite


def _logits(llm: CausalLM, embeddings_BSM: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    return llm(inputs_embeds=embeddings_BSM, attention_mask=mask_BS, use_cache=False).logits.float()


@torch.no_grad()
def has_plain_head(llm: CausalLM) -> bool:
    """Whether the logits are the output layer of the decoder's last hidden states, to the bit, and nothing else.

    Then the output layer can run at the supervised positions alone. LLMs that scale or cap their logits are no such.
    """
    decoder, head = decoder_of(llm), llm.get_output_embeddings()
    table = llm.get_input_embeddings().weight
    if decoder is llm or not isinstance(head, nn.Module) or table.device.type == "meta":
        return False
    random = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(table.shape[0], (1, LENGTH), generator=random).to(table.device)
    with evaluating(llm):
        embeddings_BSM = llm.get_input_embeddings()(ids_BS)
        hidden_BSM = getattr(decoder(inputs_embeds=embeddings_BSM, use_cache=False), "last_hidden_state", None)
        if hidden_BSM is None:
            return False
        return torch.equal(head(hidden_BSM).float(), _logits(llm, embeddings_BSM))


def decoder_of(llm: CausalLM) -> nn.Module:
    """The LLM without its output layer; the LLM itself where transformers names no such part."""
    return getattr(llm, "base_model", llm)


@contextlib.contextmanager
def evaluating(llm: CausalLM) -> Iterator[Any]:
    """Evaluation mode, without dropout, and products as in training; every module gets its own mode back."""
    modes = {module: module.training for module in llm.modules()}
    table = llm.get_input_embeddings().weight
    is_half = table.dtype in (torch.bfloat16, torch.float16)  # adapters in it are fp32, which autocast casts
    llm.eval()
    try:
        with torch.autocast(table.device.type, dtype=table.dtype if is_half else None, enabled=is_half):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
