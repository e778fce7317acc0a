"""Settings of a training run: one typed `TrainConfig`.

Later layers win: recipe (`trainer/recipes.py`), config file, command-line options. Imports no torch, because `--help`
reads this module: what is chosen by name (fusions, resamplers, heads) is listed here as `module:name` and imported when
a model is built.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from math import inf, isqrt
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml

from mervcache.config import load_yaml, overlay, to_builtin
from mervcache.errors import UserError, unknown_name
from mervcache.plugins import PlugInTable
from mervcache.reprs import changed_fields
from trainer.paths import found_settings, recorded_settings

LISTING = ("dataset", "root", "options", "stage", "kind", "limit")  # extraction settings that decide what is listed
CONFIG_FILE, RECORD_FILE = "config.yaml", "run.json"  # in a run's folder
TRAINED_SPLIT = "train"  # its questions measure nothing

Mode = Literal["frozen", "text-only"]
TrainLLM = Literal["none", "lora", "full"]
Quantisation = Literal["int8", "nf4"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]  # transformers' names
OptimizerName = Literal["adamw", "adamw8bit"]
Sampler = Literal["shuffled", "split_modality"]
LossName = Literal["per_token", "micro_batch_means"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Precision = Literal["fp32", "bf16"]
PromptName = Literal[
    "pure",
    "vicuna",
    "llama2_chat",
    "chat_template",
    "caption",
    # As princetonvisualai/merv renders them, oddities included: for its checkpoints (trainer/data/released_prompts.py).
    "pure_released",
    "vicuna_released",
    "llama2_chat_released",
    "llama3_released",
    "qwen2_released",
]
Protocol = Literal["letters", "likelihood"]  # of multiple choice, see trainer/model/multiple_choice.py
VisualPosition = Literal["after_bos", "first", "placeholder"]
MaskRule = Literal["none", "subsets", "sizes"]
PlaceholderRule = Literal["removed", "as_released"]

# What a model is made of, by name; adding a fusion, resampler or head is a class in its module and a row here. From
# outside, a fusion is a class under an entry point of the group `merv.fusions`: docs/extending.md.
BUILT_IN_FUSIONS = {
    "cross_attention": "trainer.model.fusion:CrossAttention",
    "cross_attention_released": "trainer.model.fusion:CrossAttentionReleased",
    "concat_sequence": "trainer.model.fusion:ConcatSequence",
    "concat_channel": "trainer.model.fusion:ConcatChannel",
    "concat_channel_ln": "trainer.model.fusion:ConcatChannelNorm",
    "learnable_weights": "trainer.model.fusion:LearnableWeights",
    "equal_mix": "trainer.model.fusion:MeanFusion",
    "first": "trainer.model.fusion:SingleEncoder",
}
FUSIONS: PlugInTable[str] = PlugInTable(BUILT_IN_FUSIONS, group="merv.fusions", what="fusion", kind=None)
SINGLE_ENCODER_FUSIONS = ("first",)  # read the first encoder only
# The order of arXiv 2501.01426, which concatenations and `first` depend on, and of the released checkpoints.
ENCODER_ORDER = ("languagebind", "dinov2", "vivit", "siglip")
RESAMPLERS = {
    "average": "trainer.model.projectors:Average",
    "average_upsampled": "trainer.model.projectors:UpsampledAverage",
    "attention": "trainer.model.projectors:Attention",
    "convolution": "trainer.model.projectors:Convolution",
    "convolution_3d": "trainer.model.projectors:Convolution3D",
    "class_token": "trainer.model.projectors:ClassToken",
    "all_tokens": "trainer.model.projectors:AllTokens",
}
TIME_RESAMPLERS = ("average", "convolution_3d")  # may merge time steps
HEADS = {
    "linear": "trainer.model.projectors:linear",
    "gelu-mlp": "trainer.model.projectors:gelu_mlp",
    "fused-gelu-mlp": "trainer.model.projectors:fused_gelu_mlp",
}


SIZED_BY_SAMPLES = ("batch_size", "epochs", "optimizer.projector_lr", "optimizer.fusion_lr")
CHECKPOINTING_PARAMETERS = 3e9  # of an LLM whose layers are computed again in the backward pass by default
BYTE_UNITS = {"GB": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20}


def parse_bytes(setting: str, text: str) -> int:
    """Bytes of a text such as `80GB` or `79.6 GiB`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].upper() not in BYTE_UNITS or float(found[1]) == 0:
        raise UserError(f"{setting} is a size such as 80GB or 24GiB, got {text!r}")
    return int(float(found[1]) * BYTE_UNITS[found[2].upper()])


def import_choice(table: Mapping[str, str], name: str) -> Any:
    """The class or function that `table` names, imported now; `UserError` for a plug-in that cannot be."""
    module, _, attribute = table[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name} = {table[name]} cannot be loaded: {error}") from error


def _check_choice(setting: str, name: str, table: Mapping[str, str]) -> None:
    if name not in table:
        raise UserError(unknown_name(f"value of {setting}", name, list(table)))


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """One encoder's way from stored tokens to the LLM's width; every encoder gets its own weights."""

    resampler: str = "average"  # a name in RESAMPLERS
    grid: tuple[int, int, int] | None = None  # T, H, W after the resampler; None: stored T and, trained, 8 x 8
    frame_divisor: int = 1  # T after the resampler = stored T / this, where grid is None: "3D" in the ablation
    head: str = "linear"  # a name in HEADS
    pre_layer_norm: bool = False  # layer norm before the head
    standardise: bool = False  # see trainer/model/projectors.py: for small runs with encoders of unlike scale
    # Tokens per frame, such as 64, 16, 4, 1: every step is trained at one of these grids, see trainer/data/grids.py.
    nested_grids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("projector.resampler", self.resampler, RESAMPLERS)
        _check_choice("projector.head", self.head, HEADS)
        if self.frame_divisor < 1 or min(self.grid or (1,)) < 1:
            raise UserError(f"projector grid and frame_divisor are at least 1, got {self.grid}, {self.frame_divisor}")
        if self.frame_divisor > 1 and self.resampler not in TIME_RESAMPLERS:
            raise UserError(
                f"resampler {self.resampler} keeps every time step, so frame_divisor must be 1, got"
                f" {self.frame_divisor}; {' and '.join(TIME_RESAMPLERS)} can merge them"
            )
        if self.grid is not None and not self.takes_grid:
            setting = f"frame_divisor {self.frame_divisor}" if self.frame_divisor > 1 else f"resampler {self.resampler}"
            raise UserError(f"{setting} decides the grid, got projector.grid {list(self.grid)} too; set it to null")

        self._check_nested_grids()

    def _check_nested_grids(self) -> None:
        nested = self.nested_grids
        if not nested:
            return
        if odd := [tokens for tokens in nested if tokens < 1 or isqrt(tokens) ** 2 != tokens]:
            raise UserError(f"projector.nested_grids are tokens per frame, squares such as 64, 16, 4, 1; got {odd[0]}")
        if len(set(nested)) < max(len(nested), 2):
            raise UserError(f"projector.nested_grids are two or more different grids, got {list(nested)}")
        if self.resampler != "average" or not self.takes_grid:
            found = f"resampler {self.resampler}, frame_divisor {self.frame_divisor}"
            raise UserError(f"projector.nested_grids are averages of each frame, which {found} is not; leave one out")
        side = isqrt(max(nested))
        if self.grid is not None and self.grid[1:] != (side, side):
            raise UserError(
                f"the finest of projector.nested_grids {list(nested)} is the grid of the run, {side} x {side}, got"
                f" projector.grid {list(self.grid)} too; set it to null, or to [{self.grid[0]}, {side}, {side}]"
            )

    @property
    def takes_grid(self) -> bool:
        """Whether the grid is free to choose."""
        return self.frame_divisor == 1 and self.resampler not in ("class_token", "all_tokens")


# The rows of the projector ablation (arXiv 2501.01426): any head goes with each of them.
PROJECTORS: dict[str, ProjectorConfig] = {
    "2d-average": ProjectorConfig(),  # the paper's default; its 8 x 8 is the store's grid, of a raw one set grid
    # The same with grids finer than an encoder's own, such as 256 tokens per frame of a 14 x 14 one.
    "2d-average-upsampled": ProjectorConfig(resampler="average_upsampled"),
    "2d-attention": ProjectorConfig(resampler="attention"),
    "2d-convolution": ProjectorConfig(resampler="convolution"),
    "3d-average": ProjectorConfig(frame_divisor=2),
    "3d-convolution": ProjectorConfig(resampler="convolution_3d"),
    "class-token": ProjectorConfig(resampler="class_token"),
    "all-tokens": ProjectorConfig(resampler="all_tokens"),
}


def row_of(resampler: str) -> str:
    """The `--projector` name of a resampler."""
    return next(row for row, preset in PROJECTORS.items() if preset.resampler == resampler)


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How the encoders' visual tokens become one sequence."""

    name: str = "cross_attention"  # a name in FUSIONS
    query_width: int = 3072  # of cross_attention_released only

    def __post_init__(self) -> None:
        _check_choice("fusion.name", self.name, FUSIONS)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates of the LLM's linear layers (arXiv 2106.09685), for train_llm: lora."""

    rank: int = 16  # of each update
    alpha: float = 32.0  # updates are scaled by alpha / rank
    dropout: float = 0.05  # on the input of each update
    targets: tuple[str, ...] = ()  # names of linear layers; empty: all of the decoder, not the output layer

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                "lora wants rank >= 1, alpha > 0 and dropout in [0, 1), got"
                f" {self.rank}, {self.alpha} and {self.dropout}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with one learning rate per part, linear warm-up, cosine to zero."""

    name: OptimizerName = "adamw"  # adamw8bit: moments in 8 bits, by bitsandbytes; one process or DDP on GPUs
    projector_lr: float = 2e-5  # learning rates, after the warm-up
    fusion_lr: float = 2e-5  # of the fusion's parameters
    llm_lr: float = 2e-5  # with train_llm: full
    lora_lr: float = 2e-4  # with train_llm: lora
    encoder_lr: float = 2e-6  # end to end only
    weight_decay: float = 0.0  # of tensors with two axes or more: no biases, no norms, not the fusion's query
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    eps: float = 1e-8  # of AdamW
    warmup_ratio: float = 0.03  # share of all steps
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"warmup_ratio is a share of all steps in [0, 1), got {self.warmup_ratio}")
        rates = (self.projector_lr, self.fusion_lr, self.llm_lr, self.lora_lr, self.encoder_lr)
        if not all(0 <= rate < inf for rate in rates):
            raise UserError(f"learning rates are finite and not negative, got {', '.join(map(str, rates))}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run's weights, except the data."""

    mode: Mode = "frozen"  # text-only: the same run without visual tokens, as a baseline
    llm: str = "meta-llama/Llama-2-7b-hf"  # Hub id, local folder, or fresh:NAME
    train_llm: TrainLLM = "none"  # how much of the LLM is trained
    lora: LoraConfig = field(default_factory=LoraConfig)
    llm_quant: Quantisation | None = None  # of a frozen or LoRA-trained LLM; needs CUDA, not tested on a GPU
    attn_implementation: Attention | None = None  # of the LLM; None: transformers' choice, sdpa where the LLM has it
    fused_loss: bool = False  # output layer and loss in one kernel, by liger-kernel; untested on a GPU, which it needs
    train_encoders: tuple[str, ...] = ()  # end to end only: train these too, at optimizer.encoder_lr
    allow_fresh_frozen: bool = False  # allow a frozen LLM with fresh weights
    mask_encoders: MaskRule = "none"  # each sample shows a random subset of the encoders; see trainer/data/masks.py
    encoders: tuple[str, ...] = ()  # order matters for concat and first; empty: those of `init`, else all of the store
    samples: tuple[str, ...] = ()  # sample sets of the store; empty: all
    clips_with: tuple[str, ...] = ()  # only clips that have tokens of these encoders too: runs of unlike encoders then
    # read the same samples, and are scored on the same questions
    snapshot: str = ""  # of the store, by id or tag; empty: the newest when the run starts
    stage: str = "finetune"  # samples of this stage only
    split: str = "train"  # samples of this split only
    fraction: float = 1.0  # share of the samples, chosen by their ids: a smaller share is a subset of a larger one
    limit: int | None = None  # at most this many samples, the first by sample id
    exclude: tuple[str, ...] = ()  # clips whose samples are not trained on: clip ids, or a file with one id a line
    max_windows: int | None = None  # of a store of windows: at most so many of each video, spread evenly over it
    source_weights: Mapping[str, float] = field(default_factory=dict)  # source -> times per epoch; 0.5: half, in turn
    sampler: Sampler = "shuffled"  # split_modality: batches of one modality, ranks of like length
    init: str | None = None  # run whose weights this one starts from
    init_partial: bool = False  # allow that parts of `init` are not loaded, or that it lacks some; each is reported
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    prompt: PromptName = "pure"  # how a conversation is written
    # Place of the visual tokens. after_bos: after a lone BOS, else first; placeholder: instead of <video> or <image>
    visual_position: VisualPosition = "after_bos"
    template_date: str = "2024-07-26"  # date for chat templates that insert today's; Llama 3's default
    placeholder: PlaceholderRule = (
        "removed"  # "<video>" of a question with a clip; as_released: as the released MERV code
    )
    max_text_tokens: int = 2048  # longer texts are cut at the right, and sooner where the LLM's context is full
    exceed_context: bool = False  # go beyond the LLM's context, if its positions are rotary: concat_sequence of four
    # encoders fills LLaMA-2's 4,096 without any text, and arXiv 2501.01426 has that row
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 128  # samples per step over all ranks
    micro_batch_size: int = 8  # samples per rank and forward
    # Positions per rank and forward, padding included, instead of a number of samples: trainer/data/partition.py. It
    # changes no loss per token but by rounding, and the random numbers of dropout.
    token_budget: int | None = None
    device_memory: str | None = None  # of each process, such as 80GB; None: that of its GPU, of a CPU no limit
    epochs: float = 1.0  # passes over the samples
    # Settings that a run decides by its number of samples when it begins, and their published values: at most that
    # batch_size, at least those epochs and optimizer.*_lr. One that has another value, or that is given in a file or
    # as an option, stays as it is.
    by_samples: Mapping[str, float] = field(default_factory=dict)
    max_steps: int | None = None  # instead of epochs
    seed: int = 7  # of fresh weights, the order of samples, masks and dropout
    precision: Precision = "bf16"  # matrix products; trained weights stay in fp32
    # Of the LLM's layers: less memory for a second forward. None: on for 3B parameters or more, or where the
    # device's memory needs it.
    activation_checkpointing: bool | None = None
    deterministic: bool = False  # torch's deterministic algorithms: the same losses to the bit on the same ranks
    loss: LossName = "per_token"  # micro_batch_means: as princetonvisualai/merv, depends on the micro-batch size
    log_every: int = 10  # steps between lines of metrics
    checkpoint_every: int = 500  # steps; the last step always has one
    checkpoint_minutes: float | None = None  # also a checkpoint after this many minutes
    keep_checkpoints: int = 2  # the last ones; the best by validation is kept as well
    eval_every: int | None = None  # steps between validations on held-out samples
    eval_split: str = "heldout"  # split of the validation
    max_skipped_in_row: int = 10  # steps without a finite loss and gradient, which change nothing, before a run ends
    eval_limit: int = 256  # held-out samples per validation, whose questions are scored by likelihood
    protocol: Protocol | None = None  # of merv-eval run; null: letters, or likelihood for a fresh LLM
    letters_template: str | None = None  # file with the prompt of protocol letters; null: trainer/model/letters.txt
    trackers: tuple[Tracker, ...] = ()  # in addition to the JSON lines; needs the extra `track`
    prefetch_batches: int = 4  # global batches read ahead

    def __post_init__(self) -> None:
        least_one = ("batch_size", "micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints")
        for name in (*least_one, "max_skipped_in_row"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "eval_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if odd := [name for name in self.by_samples if name not in SIZED_BY_SAMPLES]:
            raise UserError(unknown_name("setting in by_samples", odd[0], SIZED_BY_SAMPLES))
        if self.token_budget is not None:
            self._check_token_budget(self.token_budget)
        if self.device_memory is not None:
            parse_bytes("device_memory", self.device_memory)
        if self.checkpoint_minutes is not None and self.checkpoint_minutes <= 0:
            raise UserError(f"checkpoint_minutes must be more than 0, got {self.checkpoint_minutes}")
        if self.eval_every is not None and self.eval_split == self.split:
            raise UserError(f"eval_split must not be what is trained on, split {self.split!r}")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction is a share of the samples in (0, 1], got {self.fraction}")
        if isinstance(self.exclude, str):
            raise UserError(f"exclude must be a list of clip ids, got the text {self.exclude!r}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is at least 1, or null for all samples, got {self.limit}")
        if self.max_windows is not None and self.max_windows < 1:
            raise UserError(f"max_windows is at least 1, got {self.max_windows}")
        if odd := {name: weight for name, weight in self.source_weights.items() if not 0 <= weight < 1000}:
            raise UserError(f"source_weights are times per epoch, 0 leaves a source out; got {odd}")
        if self.mode == "text-only" and self.train_llm == "none":
            raise UserError("text-only training of a frozen LLM trains nothing; set train_llm: full")
        if self.mask_encoders != "none" and (self.mode == "text-only" or self.fusion.name in SINGLE_ENCODER_FUSIONS):
            what = "text-only training" if self.mode == "text-only" else f"fusion {self.fusion.name}"
            raise UserError(
                f"mask_encoders {self.mask_encoders} shows subsets of encoders, and {what} has none to choose"
            )
        if self.mask_encoders != "none" and self.projector.nested_grids:
            raise UserError(
                "mask_encoders and projector.nested_grids are one-shot methods of their own: train a run for each"
            )
        if self.train_encoders and self.mode == "text-only":
            raise UserError("text-only training has no encoders to train; leave train_encoders empty")
        if odd := [encoder for encoder in self.train_encoders if self.encoders and encoder not in self.encoders]:
            raise UserError(unknown_name("encoder in train_encoders", odd[0], self.encoders))
        if self.visual_position == "placeholder" and self.placeholder != "removed":
            raise UserError(
                "visual_position: placeholder puts visual tokens in the place of <video>, and placeholder:"
                f" {self.placeholder} keeps it as text; choose one of them"
            )
        try:
            date.fromisoformat(self.template_date)
        except ValueError:
            raise UserError(f"template_date is a day as YYYY-MM-DD, got {self.template_date!r}") from None
        is_fresh = self.has_fresh_llm
        if is_fresh and self.train_llm != "full" and not self.allow_fresh_frozen:
            raise UserError(
                f"llm {self.llm!r} has fresh weights and train_llm is {self.train_llm}: a frozen random LLM cannot"
                " learn to answer; set train_llm: full, or allow_fresh_frozen: true to do it all the same"
            )
        if self.llm_quant is not None and (is_fresh or self.train_llm == "full"):
            raise UserError(
                f"llm_quant {self.llm_quant} is for a pretrained LLM that is not trained itself, got llm {self.llm!r}"
                f" and train_llm {self.train_llm}; set train_llm: lora or none, or leave llm_quant out"
            )

    def _check_token_budget(self, budget: int) -> None:
        if budget < 1:
            raise UserError(f"token_budget is a number of positions, at least 1, got {budget}")
        if self.loss == "micro_batch_means":
            raise UserError(
                "loss micro_batch_means depends on which samples share a micro-batch, and token_budget decides that"
                " by their lengths; set loss: per_token, or leave token_budget out"
            )

    __repr__ = changed_fields

    @property
    def undecided(self) -> tuple[str, ...]:
        """Settings that the number of samples decides: those of `by_samples` that have their published values."""
        return tuple(name for name, value in self.by_samples.items() if attrgetter(name)(self) == value)

    @property
    def has_fresh_llm(self) -> bool:
        """Whether the LLM starts from fresh weights."""
        return self.llm.startswith("fresh:")

    def to_yaml(self) -> str:
        """Text that `TrainConfig` reads back to the same value."""
        return yaml.safe_dump(to_builtin(dataclasses.asdict(self)), sort_keys=False)

    def recorded_yaml(self, run: Path, before: Mapping[str, Any] | None = None) -> str:
        """Text that `read_config` reads back from the folder `run`, wherever that is by then; `before` is in it now."""
        settings = recorded_settings(dataclasses.asdict(self), run, before)
        return yaml.safe_dump(to_builtin(settings), sort_keys=False)


@dataclass(frozen=True, kw_only=True)
class LiveRequest:
    """Tokens to compute live: the settings of a `merv-pipeline extract`."""

    settings: Mapping[str, Any]  # such as dataset, root, weights; they win over the file
    config_file: Path | None = None
    is_trusted: bool = False  # skip the media check before the first step


def read_config(run: Path) -> TrainConfig:
    """The settings a run was started with."""
    if not (Path(run) / CONFIG_FILE).is_file():
        raise UserError(
            f"{run} is not a run: it has no {CONFIG_FILE}; give the folder that merv-train wrote with --out"
        )
    settings = load_yaml(Path(run) / CONFIG_FILE)
    if not settings:
        raise UserError(f"{Path(run) / CONFIG_FILE} is empty; put it back from a copy of the run")
    if (last := dataclasses.fields(TrainConfig)[-1].name) not in settings:  # written last, by every version
        raise UserError(f"{Path(run) / CONFIG_FILE} is cut short: it has no {last}; put it back from a copy of the run")
    return overlay(TrainConfig(), found_settings(settings, Path(run)))


def in_paper_order(encoders: Iterable[str]) -> list[str]:
    """The default order: that of `ENCODER_ORDER`, then all others by name.

    A store that holds an encoder under two identities has keys `name@grid` or `name@identity`; they take their name's
    place.
    """
    places = {encoder: place for place, encoder in enumerate(ENCODER_ORDER)}
    return sorted(encoders, key=lambda key: (places.get(key.partition("@")[0], len(places)), key))


def used_encoders(config: TrainConfig, available: Sequence[str]) -> list[str]:
    """The encoders a run reads, in order: those configured, or all available; one where the fusion reads only one.

    `available` is in the order of the run: the recorded one, or `in_paper_order`.
    """
    chosen = list(config.encoders or available)
    if config.fusion.name in SINGLE_ENCODER_FUSIONS:
        chosen = chosen[:1]
    for encoder in chosen:
        if encoder not in available:
            raise UserError(unknown_name("encoder", encoder, available))
    return chosen
