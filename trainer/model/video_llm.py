"""VideoLLM: projectors, fusion and any Hugging Face causal LM as one model, and building it from a config.

Visual tokens are inserted where the batch says (after a lone BOS, else first), carry no label and take positions
0..S-1, as in arXiv 2501.01426. Samples without a clip have no visual tokens at all, not masked ones.

B samples, C distinct clips, N visual tokens, M LLM width, L text length, S sequence length, V vocabulary, K supervised
tokens of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from featurestore.clips import Sample
from mervcache.errors import UserError
from trainer.config import TrainConfig, used_encoders
from trainer.data.collate import Batch
from trainer.data.masks import mask_of
from trainer.data.order import derive_seed
from trainer.data.prompts import IGNORE_INDEX, PROMPTS, Renderer, without_placeholder
from trainer.data.tokens import ClipTokens, TokenShape
from trainer.model.causal_lm import CausalLM
from trainer.model.fusion import Fusion, build_fusion
from trainer.model.llm import FRESH_PREFIX, LoadedLLM, adapt, end_ids, load_llm, num_embeddings
from trainer.model.padding import Padding, decoder_of, has_plain_head, settle_padding
from trainer.model.projectors import Projector, build_projectors

LOGIT_BYTES = 2**28  # fp32 logits at once; the output layer of more tokens is computed again in the backward pass
MASK_KEPT = Padding(keeps_mask=True, reason="it was not measured")


class VideoLLM(nn.Module):
    """`projectors` and `fusion` may be empty: then it is the plain LLM, the text-only baseline."""

    def __init__(
        self,
        llm: CausalLM,
        projectors: Mapping[str, Projector],
        fusion: Fusion | None,
        *,
        exceeds_context: bool = False,
    ) -> None:
        super().__init__()
        self.exceeds_context = exceeds_context  # sequences may be longer than the LLM's context
        self.llm = llm
        self.encoders = tuple(projectors)  # module names may not hold a dot, encoder names may
        self.projectors = cast("Sequence[Projector]", nn.ModuleList(projectors.values()))
        self.fusion = fusion
        self.trained_names: tuple[str, ...] = ()
        self.trained_encoders = nn.ModuleList()  # end to end only, see `join`
        self.keeps_logits = "logits_to_keep" in inspect.signature(llm.forward).parameters
        self.padding = MASK_KEPT
        self.has_plain_head = False  # see `settle`
        self.fuses_loss = False  # see `fuse_loss`

    def settle(self, longest: int) -> None:
        """Measure how the LLM reads padding of sequences up to `longest`, and whether its output layer stands alone."""
        self.padding = settle_padding(self.llm, longest)
        self.has_plain_head = has_plain_head(self.llm)

    def fuse_loss(self) -> None:
        """Have Liger's kernel (arXiv 2410.10989) compute output layer and loss in one, without logits in memory.

        UserError where it is not installed, or the LLM's logits are not those of a linear layer.
        """
        if find_spec("liger_kernel") is None:
            raise UserError("fused_loss needs liger-kernel: pip install liger-kernel, or leave it out")
        if not self.has_plain_head or type(self.llm.get_output_embeddings()) is not nn.Linear:
            raise UserError(f"fused_loss: the logits of {type(self.llm).__name__} are not a linear layer; leave it out")
        self.fuses_loss = True

    def join(self, encoders: Mapping[str, nn.Module]) -> None:
        """Train these encoders with the rest: batches hold their frames, and `encode` makes tokens of them."""
        self.trained_names = tuple(encoders)
        self.trained_encoders = nn.ModuleList(encoders.values())

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The encoders that are trained, by name."""
        return dict(zip(self.trained_names, self.trained_encoders, strict=True))

    @property
    def has_visual(self) -> bool:
        """Whether the model reads visual tokens; a text-only one does not."""
        return self.fusion is not None

    @property
    def num_visual_tokens(self) -> int:
        """N after fusion; 0 for a text-only model."""
        return self.num_visual_tokens_at(None)

    def num_visual_tokens_at(self, tokens_per_frame: int | None) -> int:
        """The same at one of the nested grids; None is the finest, that of every other run."""
        if self.fusion is None:
            return 0
        return self.fusion.num_tokens(self.projectors[0].num_tokens_at(tokens_per_frame))

    @property
    def context(self) -> int | None:
        """The LLM's `max_position_embeddings`; None if it has none, or may be exceeded."""
        return None if self.exceeds_context else getattr(self.llm.config, "max_position_embeddings", None)

    def train(self, mode: bool = True) -> VideoLLM:
        """A frozen LLM stays in evaluation mode: its dropout would only be noise."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.llm.parameters()):
            self.llm.eval()
        return self

    def encode(self, tokens: Mapping[str, ClipTokens]) -> dict[str, ClipTokens]:
        """Frames of the trained encoders -> their tokens_CTHWD; tokens of the frozen ones stay as they are."""
        return {**tokens, **{name: network(tokens[name]) for name, network in self.trained.items()}}

    def visual_tokens(
        self, tokens: Mapping[str, ClipTokens], shown_CE: Tensor | None = None, tokens_per_frame: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """encoder -> tokens_CTHWD to fused_CNM and the encoders' weights_CE.

        `shown_CE` as `Fusion` reads it, `tokens_per_frame` of nested grids.
        """
        tokens = self.encode(tokens)
        projected = [
            projector(tokens[encoder], tokens_per_frame)
            for encoder, projector in zip(self.encoders, self.projectors, strict=True)
        ]
        return self.fuse(projected, shown_CE)

    def fuse(self, projected: Sequence[Tensor], shown_CE: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Visual tokens of every encoder -> fused_CNM and the encoders' weights_CE; not for a text-only model."""
        assert self.fusion is not None
        return self.fusion(projected, shown_CE)

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over the supervised tokens of the batch."""
        if not self.fuses_loss:
            return self.token_losses(batch).sum()
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]: wants a GPU
            liger_fused_linear_cross_entropy,
        )

        head = self.llm.get_output_embeddings()
        hidden_KM, labels_K = self._supervised(batch)
        return liger_fused_linear_cross_entropy(hidden_KM, head.weight, labels_K, head.bias, reduction="sum")

    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy by sample and position, float32 [B, S - first_label], zero where nothing is supervised."""
        if not self.has_plain_head:
            return _cross_entropy(*self._predictions(batch))
        hidden_KM, labels_K = self._supervised(batch)
        losses_K = _head_losses(self.llm.get_output_embeddings(), hidden_KM, labels_K)
        losses_BS = losses_K.new_zeros(batch.labels_BS.numel()).index_copy(0, batch.supervised_K, losses_K)
        return losses_BS.view(batch.labels_BS.shape)[:, max(batch.first_label, 1) :]

    def _supervised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """hidden_KM that predict supervised tokens, and labels_K."""
        hidden_BSM = decoder_of(self.llm)(
            inputs_embeds=self.splice(batch), attention_mask=self._mask(batch), use_cache=False
        ).last_hidden_state
        hidden_KM = hidden_BSM.flatten(0, 1).index_select(0, batch.supervised_K - 1)  # p is predicted at p - 1
        return hidden_KM, batch.labels_BS.flatten()[batch.supervised_K]

    def _mask(self, batch: Batch) -> Tensor | None:
        return batch.attention_mask_BS if self.padding.keeps_mask else None

    def _predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """logits_BPV and labels_BP, P positions from the first label of the batch on."""
        embeddings_BSM = self.splice(batch)
        first = max(batch.first_label, 1)  # position p is predicted at p - 1
        # By index, not by count: a slice is not contiguous, and torch then copies the output layer once per sample on
        # the CPU in bf16 (SmolLM2-135M, 8 samples of 28 tokens: a forward took 4.5 CPU seconds, and takes 0.5).
        places_P = torch.arange(first - 1, embeddings_BSM.shape[1] - 1, device=embeddings_BSM.device)
        options = {"logits_to_keep": places_P} if self.keeps_logits else {}
        output = self.llm(inputs_embeds=embeddings_BSM, attention_mask=self._mask(batch), use_cache=False, **options)
        logits_BPV = output.logits if self.keeps_logits else output.logits[:, places_P]
        return logits_BPV, batch.labels_BS[:, first:]

    def splice(self, batch: Batch) -> Tensor:
        """Text embeddings with each sample's visual tokens in their place: embeddings_BSM, padded with zeros."""
        text_BLM = self.llm.get_input_embeddings()(batch.input_ids_BL)
        visual_CNM = None
        if batch.tokens:
            visual_CNM, _ = self.visual_tokens(batch.tokens, batch.shown_CE, batch.tokens_per_frame)
            visual_CNM = visual_CNM.to(text_BLM.dtype)
        elif self.training:
            text_BLM = text_BLM + self._nothing(text_BLM.dtype)
        rows = []
        places = zip(batch.lengths, batch.visual_at, batch.clip_rows, batch.num_rows, strict=True)
        for index, (length, at, row, count) in enumerate(places):
            text_LM = text_BLM[index, :length]
            visual = [] if visual_CNM is None else [self._of_row(visual_CNM, batch, r) for r in range(row, row + count)]
            rows.append(torch.cat([text_LM[:at], *visual, text_LM[at:]]))
        return pad_sequence(rows, batch_first=True)

    def _of_row(self, visual_CNM: Tensor, batch: Batch, row: int) -> Tensor:
        """A row's visual tokens, without those of masked encoders where the fusion leaves them out."""
        if batch.shown_CE is None or batch.masks is None or self.fusion is None or not self.fusion.leaves_out_masked:
            return visual_CNM[row]
        by_encoder = visual_CNM[row].chunk(self.fusion.num_encoders)
        return torch.cat([part for part, is_shown in zip(by_encoder, batch.masks[row], strict=True) if is_shown])

    def _nothing(self, dtype: torch.dtype) -> Tensor:
        """Zero that depends on every visual parameter: ranks whose batch is all text still join the gradient sum."""
        fusions = [] if self.fusion is None else [self.fusion]
        visual = nn.ModuleList([*self.projectors, *self.trained_encoders, *fusions])
        parts = [parameter.sum() * 0.0 for parameter in visual.parameters() if parameter.requires_grad]
        return sum(parts, start=torch.zeros((), device=self.llm.device)).to(dtype)

    def sample_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over each sample's supervised tokens, float32 [B]."""
        return self.token_losses(batch).sum(1)

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Mean log-likelihood of each sample's supervised tokens, float32 [B]: scores options of unlike length."""
        return -self.sample_losses(batch) / batch.supervised_B

    @torch.no_grad()
    def likelihood(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each sample's supervised tokens in all, float32 [B]; whether each is the likeliest, [B]."""
        logits_BPV, labels_BP = self._predictions(batch)
        is_greedy_BP = (logits_BPV.argmax(-1) == labels_BP) | (labels_BP == IGNORE_INDEX)
        return -_cross_entropy(logits_BPV, labels_BP).sum(1), is_greedy_BP.all(1)

    @torch.no_grad()
    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """New token ids [B, new] behind open questions; `options` go to the LLM's own `generate`."""
        embeddings_BSM, mask_BS = self.left_padded(batch)
        return self.llm.generate(inputs_embeds=embeddings_BSM, attention_mask=mask_BS, **options)

    def left_padded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`splice` and its mask with the padding at the left: what follows continues at the right end."""
        embeddings_BSM = self.splice(batch)
        lengths = batch.attention_mask_BS.sum(1).tolist()
        left = [embeddings_BSM.shape[1] - length for length in lengths]
        embeddings_BSM = torch.stack([row.roll(shift, 0) for row, shift in zip(embeddings_BSM, left, strict=True)])
        mask_BS = torch.stack([row.roll(shift) for row, shift in zip(batch.attention_mask_BS, left, strict=True)])
        return embeddings_BSM, mask_BS


def _cross_entropy(logits_BPV: Tensor, labels_BP: Tensor) -> Tensor:
    """float32 [B, P], zero where there is no label."""
    losses = F.cross_entropy(
        logits_BPV.float().flatten(0, 1), labels_BP.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view(labels_BP.shape)


def _head_losses(head: nn.Module, hidden_KM: Tensor, labels_K: Tensor) -> Tensor:
    """Cross-entropy of the output layer's predictions, float32 [K], a chunk of rows at a time.

    Of more than one chunk none keeps its logits: they are computed again in the backward pass.
    """
    width = getattr(head, "out_features", None) or cast("Tensor", head.weight).shape[0]
    rows = max(1, LOGIT_BYTES // (4 * width))
    if len(labels_K) <= rows:
        return _row_losses(head, hidden_KM, labels_K)
    chunks = zip(hidden_KM.split(rows), labels_K.split(rows), strict=True)
    return torch.cat([checkpoint(_row_losses, head, *chunk, use_reentrant=False) for chunk in chunks])


def _row_losses(head: nn.Module, hidden_KM: Tensor, labels_K: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_KM).float(), labels_K, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model ready to train or to use."""

    model: VideoLLM
    llm: LoadedLLM
    renderer: Renderer
    config: TrainConfig
    shown: tuple[str, ...] | None = None  # encoders whose tokens evaluations show; None: all
    tokens_per_frame: int | None = None  # of nested grids, the one that evaluations read; None: the finest

    @property
    def saves_llm(self) -> bool:
        """Whether the LLM's weights exist only in this run."""
        return self.llm.is_fresh or self.config.train_llm == "full"

    @property
    def most_visual_tokens(self) -> int:
        """Of a sample: those of every window that it may be shown."""
        return self.model.num_visual_tokens * (self.config.max_windows or 1)

    def autocast(self, device: torch.device | str) -> torch.autocast:
        """The precision of the run's training, for a forward of the model; tokens are fetched outside of it."""
        is_half = self.config.precision == "bf16"
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=is_half)


def shown_to(built: Built, num_samples: int) -> dict[str, Any]:
    """Options of `make_batch` for samples of an evaluation: the encoders and the grid that it reads."""
    if not built.model.has_visual:
        return {}
    options: dict[str, Any] = {"tokens_per_frame": built.tokens_per_frame}
    if built.shown is not None:
        options["masks"] = [mask_of(built.model.encoders, built.shown)] * num_samples
        options["leaves_out_masked"] = built.model.fusion is not None and built.model.fusion.leaves_out_masked
    return options


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
        config.prompt,
        llm.tokenizer,
        position=config.visual_position,
        placeholder=config.placeholder,
        template_date=config.template_date,
        end_ids=end_ids(llm.model),
        num_embeddings=num_embeddings(llm.model),
        max_tokens=_text_limit(config, model),
    )
    model.settle(renderer.max_tokens + model.num_visual_tokens * (config.max_windows or 1))
    if config.fused_loss:
        model.fuse_loss()
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
    """Text tokens per sample: one limit for the whole run, with or without a clip."""
    visual = model.num_visual_tokens * (config.max_windows or 1)
    left = config.max_text_tokens if model.context is None else model.context - visual
    return max(1, min(config.max_text_tokens, left))


def new_llm(
    config: TrainConfig, samples: Iterable[Sample], words: Iterable[str] = (), device: torch.device | None = None
) -> LoadedLLM:
    """The LLM a run starts from; a fresh one knows the words of the samples, and `words`.

    One that is not trained itself is read straight onto `device`.
    """
    torch.manual_seed(derive_seed("llm", config.seed))
    texts = chain(texts_of(config, samples), words) if config.llm.startswith(FRESH_PREFIX) else ()
    return load_llm(
        config.llm,
        texts=texts,
        dtype=llm_dtype(config),
        quant=config.llm_quant,
        attention=config.attn_implementation,
        device=None if config.train_llm == "full" else device,
    )


def llm_dtype(config: TrainConfig) -> torch.dtype:
    """Weights that are not trained need no fp32 master copy; LoRA adapters are fp32."""
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
        turns = without_placeholder(sample.turns, sample.clip_id is not None)
        yield from (piece.text for piece in PROMPTS[config.prompt](turns, None))
        yield from sample.options
