"""Every setting of a training run, as one typed value that YAML can say and a run keeps beside its weights.

Comes in: a recipe's name, a YAML file, command-line options. Goes out: a `TrainConfig`. Later layers win over
earlier ones. This room imports no torch: the command line reads it for `--help`, and that has to be instant. The
names of heads and fusions are therefore listed here, and the rooms that build them must offer exactly these.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from featurestore.errors import UserError, unknown_name

CONFIG_FILE, RECORD_FILE = "config.yaml", "run.json"  # in a run's folder

Mode = Literal["frozen", "text-only"]
TrainLLM = Literal["none", "full"]
Precision = Literal["fp32", "bf16"]
PromptName = Literal["pure", "vicuna", "llama2_chat", "chat_template"]
VisualPosition = Literal["after_bos", "first"]
ResamplerName = Literal["average"]
HeadName = Literal["linear", "gelu-mlp", "fused-gelu-mlp"]
FusionName = Literal[
    "cross_attention",
    "cross_attention_released",
    "concat_sequence",
    "concat_channel",
    "concat_channel_ln",
    "learnable_weights",
    "equal_mix",
    "first",
]


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """One encoder's way from stored tokens to the LLM's width; every encoder gets its own weights."""

    resampler: ResamplerName = "average"
    grid: tuple[int, int, int] | None = None  # T, H, W after the resampler; None keeps the stored grid
    head: HeadName = "linear"
    pre_layer_norm: bool = False  # LayerNorm(D) before the head
    standardise: bool = False  # see trainer/standardise.py: for small runs with encoders of unlike scale


PROJECTORS: dict[str, ProjectorConfig] = {
    "linear": ProjectorConfig(),  # the paper's default: 2D average to 8 x 8, then Linear
    "linear-ln": ProjectorConfig(pre_layer_norm=True),
    "gelu-mlp": ProjectorConfig(head="gelu-mlp"),
    "fused-gelu-mlp": ProjectorConfig(head="fused-gelu-mlp"),
}


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How the encoders' visual tokens become one sequence."""

    name: FusionName = "cross_attention"
    query_width: int = 3072  # of cross_attention_released only


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with one learning rate per part, linear warm-up, cosine to zero."""

    projector_lr: float = 2e-5
    fusion_lr: float = 2e-5
    llm_lr: float = 2e-5
    weight_decay: float = 0.0  # of tensors with two axes or more; biases, norms and queries never decay
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_ratio: float = 0.03  # share of all steps
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"warmup_ratio is a share of all steps in [0, 1), got {self.warmup_ratio}")
        if min(self.projector_lr, self.fusion_lr, self.llm_lr) < 0:
            raise UserError("learning rates must not be negative")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a run's weights, besides the data."""

    mode: Mode = "frozen"  # text-only: the same run without visual tokens, the baseline a score stands beside
    llm: str = "meta-llama/Llama-2-7b-hf"  # Hub id, local folder, or fresh:NAME
    train_llm: TrainLLM = "none"
    allow_fresh_frozen: bool = False  # a frozen LLM with fresh weights is an error otherwise
    encoders: tuple[str, ...] = ()  # order matters for concat and first; empty: all of the store
    samples: tuple[str, ...] = ()  # sample sets of the store; empty: all
    stage: str = "finetune"  # samples of this stage only
    split: str = "train"
    limit: int | None = None  # at most so many samples, the first by sample id
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    prompt: PromptName = "pure"
    visual_position: VisualPosition = "after_bos"  # after a BOS that stands alone, else first
    max_text_tokens: int = 2048  # longer texts are cut at the right
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 128  # samples per step over all ranks
    micro_batch_size: int = 8  # samples per rank and forward
    epochs: float = 1.0
    max_steps: int | None = None  # instead of epochs
    seed: int = 7
    precision: Precision = "bf16"  # matrix products; trained weights stay in fp32
    log_every: int = 10  # steps between lines of metrics
    checkpoint_every: int = 500  # steps; the last step always has one
    keep_checkpoints: int = 2
    prefetch_batches: int = 4  # global batches read ahead

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mode == "text-only" and self.train_llm == "none":
            raise UserError("text-only training of a frozen LLM trains nothing; set train_llm: full")
        is_fresh = self.llm.startswith("fresh:")
        if is_fresh and self.train_llm == "none" and not self.allow_fresh_frozen:
            raise UserError(
                f"llm {self.llm!r} has fresh weights and train_llm is none: a frozen random LLM cannot learn to answer;"
                " set train_llm: full, or allow_fresh_frozen: true to do it all the same"
            )

    def to_yaml(self) -> str:
        """Text that `TrainConfig` reads back to the same value."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a config file."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    if not isinstance(loaded or {}, dict):
        raise UserError(f"config file {path} must hold a mapping of settings, got a {type(loaded).__name__}")
    return loaded or {}


def overlay(config: Any, changes: Mapping[str, Any], where: str = "") -> Any:
    """`config` with `changes` laid over it; nested mappings change nested values, unknown keys are errors."""
    hints = typing.get_type_hints(type(config))
    values = {}
    for key, value in changes.items():
        name = f"{where}{key}"
        if key not in hints:
            raise UserError(unknown_name("setting", name, [f"{where}{known}" for known in hints]))
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"setting {name} is a mapping, got {value!r}")
            values[key] = overlay(current, value, where=f"{name}.")
        else:
            values[key] = _typed(value, hints[key], name)
    return dataclasses.replace(config, **values)


def read_config(run: Path) -> TrainConfig:
    """The settings a run was started with."""
    if not (Path(run) / CONFIG_FILE).is_file():
        raise UserError(
            f"{run} is not a run: it has no {CONFIG_FILE}; give the folder that merv-train wrote with --out"
        )
    return overlay(TrainConfig(), load_yaml(Path(run) / CONFIG_FILE))


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as the field's type, or an error that says what is expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _typed(value, next(a for a in arguments if a is not type(None)), name)
    if origin is Literal:
        if value not in arguments:
            raise UserError(unknown_name(f"value of {name}", value, list(arguments)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"setting {name} is a list, got {value!r}")
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) != len(value):
            raise UserError(f"setting {name} has {len(inner)} entries, got {value!r}")
        return tuple(_typed(item, kind, name) for item, kind in zip(value, inner, strict=True))
    return _scalar(value, hint, name)


def _scalar(value: Any, hint: type, name: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 2e-5 as text: it wants 2.0e-5
        except ValueError:
            pass
    if hint is float and is_number:
        return float(value)
    if type(value) is hint:
        return value
    raise UserError(f"setting {name} is {hint.__name__}, got {value!r}")


def _plain(value: Any) -> Any:
    """Tuples as lists, which is all that YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
