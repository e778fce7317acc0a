"""Scores of options that follow one prompt: the prompt, with its visual tokens, is read once for all of them.

The keys and values of the prompt are kept and shown to every option. Equal to scoring whole sequences but for
rounding: within 1e-5 of the mean log-likelihood in fp32, and within the precision of the numbers in bf16. LLMs whose
cache is more than keys and values of all positions (sliding windows, linear attention) are scored by whole sequences.

B questions, S padded length of their prompts, K options of one question, L their padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trainer.data.collate import Batch
from trainer.data.prompts import IGNORE_INDEX, Rendered
from trainer.model.video_llm import VideoLLM


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A prompt and what follows it in each rendering of a question."""

    prefix: Rendered
    ids: tuple[tuple[int, ...], ...]  # behind the prefix, up to the last supervised token
    labels: tuple[tuple[int, ...], ...]


def can_share(model: VideoLLM) -> bool:
    """Whether the LLM's cache is keys and values of all positions."""
    layers = DynamicCache(config=model.llm.config).layers
    return model.keeps_logits and all(type(layer) is DynamicLayer for layer in layers)


def split(renderings: Sequence[Rendered]) -> Shared | None:
    """The text up to the first supervised token and the rest; None where renderings begin in different ways."""
    first = renderings[0]
    places = {next((i for i, label in enumerate(one.labels) if label != IGNORE_INDEX), 0) for one in renderings}
    length = min(places)
    heads = {(one.input_ids[:length], one.visual_at) for one in renderings}
    if len(places) > 1 or len(heads) > 1 or not first.visual_at <= length or length == 0:
        return None
    ends = [max(i for i, label in enumerate(one.labels) if label != IGNORE_INDEX) + 1 for one in renderings]
    return Shared(
        prefix=Rendered(input_ids=first.input_ids[:length], labels=(IGNORE_INDEX,) * length, visual_at=first.visual_at),
        ids=tuple(one.input_ids[length:end] for one, end in zip(renderings, ends, strict=True)),
        labels=tuple(one.labels[length:end] for one, end in zip(renderings, ends, strict=True)),
    )


@torch.no_grad()
def score_shared(model: VideoLLM, batch: Batch, questions: Sequence[Shared]) -> list[list[float]] | None:
    """Mean log-likelihood of the supervised tokens of each option, by question; `batch` holds their prefixes.

    None where the LLM has kept something else than keys and values.
    """
    embeddings_BSM, mask_BS = model.left_padded(batch)
    output = model.llm(
        inputs_embeds=embeddings_BSM,
        attention_mask=mask_BS,
        position_ids=(mask_BS.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    layers = getattr(output.past_key_values, "layers", None)
    if layers is None or not all(type(layer) is DynamicLayer for layer in layers):
        return None
    lengths = mask_BS.sum(1).tolist()
    scores = []
    for index, (question, length) in enumerate(zip(questions, lengths, strict=True)):
        # Without the padding at the left, so that the options read what they would read in a batch of their own.
        kept = [
            (layer.keys[index : index + 1, :, -length:], layer.values[index : index + 1, :, -length:])
            for layer in layers
        ]
        scores.append(_score_options(model, kept, output.logits[index, -1], question, length))
    return scores


def _score_options(
    model: VideoLLM, kept: Sequence[tuple[Tensor, Tensor]], logits_V: Tensor, question: Shared, length: int
) -> list[float]:
    """Scores of the options of one question behind the keys and values of its prompt."""
    device, num_options = logits_V.device, len(question.ids)
    ids_KL = _pad(question.ids, 0, device)
    labels_KL = _pad(question.labels, IGNORE_INDEX, device)
    logits_KLV = logits_V.float().expand(num_options, 1, -1)  # the first token is predicted by the prompt
    if ids_KL.shape[1] > 1:
        # The last token predicts nothing that is scored.
        counts_K = torch.tensor([len(ids) for ids in question.ids], device=device)
        places_L = torch.arange(ids_KL.shape[1] - 1, device=device)
        mask_KL = (places_L[None] < counts_K[:, None]).long()
        cache = DynamicCache()
        for number, (keys, values) in enumerate(kept):
            cache.update(keys.expand(num_options, -1, -1, -1), values.expand(num_options, -1, -1, -1), number)
        output = model.llm(
            inputs_embeds=model.llm.get_input_embeddings()(ids_KL[:, :-1]),
            attention_mask=torch.cat([mask_KL.new_ones(num_options, length), mask_KL], dim=1),
            position_ids=(length + places_L).expand(num_options, -1),
            past_key_values=cache,
            use_cache=True,
        )
        logits_KLV = torch.cat([logits_KLV, output.logits.float()], dim=1)
    losses_N = F.cross_entropy(
        logits_KLV.flatten(0, 1), labels_KL.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return (-losses_N.view_as(labels_KL).sum(1) / (labels_KL != IGNORE_INDEX).sum(1)).tolist()


def _pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill).to(device)
