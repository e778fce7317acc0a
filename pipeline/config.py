"""What an extraction is asked to do: one typed value, from a YAML file and the command line.

Comes in: a mapping of settings. Goes out: `ExtractConfig`, checked. An unknown key is an error that names the nearest
known one: a misspelt setting that is silently ignored costs a night on a cluster.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from featurestore.errors import UserError
from featurestore.identity import STORAGE_DTYPES
from pipeline.encoders.registry import MERV_ENCODERS

COMPUTE_DTYPES = ("float32", "bfloat16")
AUTO = 0  # "choose for the device": resolved before work starts and recorded in the store


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What decides an encoder's features, besides its name; small and picklable, workers load encoders from it."""

    name: str
    weights: str = "hub"  # hub | a folder | random:SEED
    architecture: Mapping[str, Any] = field(default_factory=dict)  # sizes other than the published ones
    crop: str | None = None  # squash | centre-crop; None: the encoder's own, as published
    grid: tuple[int, int, int] | None = (16, 8, 8)  # T, H, W of the stored tokens; None: the encoder's own grid
    prefix_tokens: bool = False  # store class and register tokens beside
    compute_dtype: str = "bfloat16"  # as princetonvisualai/merv runs them
    storage_dtype: str = "float16"
    decoder: str = "frames/1"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What one worker loads and starts; small and picklable."""

    encoders: tuple[EncoderSettings, ...]
    device: str = "auto"
    threads: int = AUTO  # torch threads; decides the last bits of a sum, so it is fixed for a store
    decode_processes: int = AUTO
    decode_timeout_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Every setting of `merv-pipeline extract`; the first part decides bytes, the rest only speed and place."""

    dataset: str
    root: str | None = None  # folder of the media and annotations; None: the dataset's own default
    options: Mapping[str, Any] = field(default_factory=dict)  # the dataset's own options
    store: str | None = None  # None: features/DATASET.zarr
    stage: str | None = None  # align | finetune | None: all
    kind: str | None = None  # video | image | None: all
    limit: int | None = None  # clips, the first of the listing
    samples: bool = True  # False where a licence forbids copying the annotations
    encoders: tuple[str, ...] = MERV_ENCODERS
    weights: Mapping[str, str] = field(default_factory=dict)  # encoder -> SPEC; "" is the default of all
    architecture: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # encoder -> sizes
    crop: Mapping[str, str] = field(default_factory=dict)  # encoder -> squash | centre-crop; "" is for all
    grid: tuple[int, int, int] | None = (16, 8, 8)
    prefix_tokens: bool = False
    compute_dtype: str = "bfloat16"  # as princetonvisualai/merv runs them
    storage_dtype: str = "float16"
    decoder: str = "frames/1"
    accept_damaged: bool = False
    block_rows: Mapping[str, int] = field(default_factory=dict)  # kind -> clips per block, fixed at creation
    batch: Mapping[str, int] = field(default_factory=dict)  # kind -> clips per forward; absent: chosen for the device
    new_identity: bool = False
    retry_quarantine: bool = False
    scheduler: str = "local"
    workers: int = 1
    device: str = "auto"  # auto: cuda where torch sees one, else cpu
    threads: int = AUTO  # torch threads per worker
    decode_processes: int = AUTO  # per worker
    decode_timeout_s: float = 60.0
    max_failed: float = 0.5  # stop when more than this share of at least one block's worth of clips failed
    dashboard: bool = False

    def __post_init__(self) -> None:
        _check_choice("storage_dtype", self.storage_dtype, STORAGE_DTYPES)
        _check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if self.grid is not None:
            if len(tuple(self.grid)) != 3 or any(int(n) < 1 for n in self.grid):
                raise UserError(f"grid is three numbers T, H, W of at least 1, or raw, got {self.grid!r}")
            object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))
        object.__setattr__(self, "encoders", tuple(self.encoders))
        if not self.encoders or len(set(self.encoders)) < len(self.encoders):
            raise UserError(f"encoders must be a list of different names, got {', '.join(self.encoders) or 'none'}")
        for setting in ("weights", "architecture", "crop"):
            if stray := sorted(set(getattr(self, setting)) - set(self.encoders) - {""}):
                raise UserError(f"{setting} is set for {', '.join(stray)}, which is not among the encoders asked for")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"max_failed is a share between 0 and 1, got {self.max_failed}")

    @property
    def store_path(self) -> Path:
        return Path(self.store or f"features/{self.dataset}.zarr")

    @property
    def encoder_settings(self) -> tuple[EncoderSettings, ...]:
        """One value per encoder, in the order asked for."""
        return tuple(
            EncoderSettings(
                name=name,
                weights=self.weights.get(name, self.weights.get("", "hub")),
                architecture=self.architecture.get(name, {}),
                crop=self.crop.get(name, self.crop.get("")),
                grid=self.grid,
                prefix_tokens=self.prefix_tokens,
                compute_dtype=self.compute_dtype,
                storage_dtype=self.storage_dtype,
                decoder=self.decoder,
            )
            for name in self.encoders
        )

    @property
    def engine_settings(self) -> EngineSettings:
        """What every worker of the run loads."""
        return EngineSettings(
            encoders=self.encoder_settings,
            device=self.device,
            threads=self.threads,
            decode_processes=self.decode_processes,
            decode_timeout_s=self.decode_timeout_s,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_config(path: str | Path | None, overrides: Mapping[str, Any]) -> ExtractConfig:
    """The YAML file's settings with the command line's laid over them; `None` on the command line means not given."""
    settings = dict(_read_yaml(path)) if path else {}
    for name, value in overrides.items():
        if value is None:
            continue
        merges = isinstance(value, Mapping) and isinstance(settings.get(name), Mapping)
        settings[name] = {**settings[name], **value} if merges else value
    _check_known(settings, path)
    for name in ("weights", "crop"):
        if isinstance(settings.get(name), str):
            settings[name] = {"": settings[name]}
    if settings.get("grid") == "raw":
        settings["grid"] = None
    if "dataset" not in settings:
        raise UserError("which dataset? give --dataset NAME; `merv-pipeline datasets` lists them")
    return ExtractConfig(**settings)


def _read_yaml(path: str | Path) -> Mapping[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(settings, Mapping):
        raise UserError(f"config file {path} must hold `setting: value` lines, got {type(settings).__name__}")
    return settings


def _check_known(settings: Mapping[str, Any], path: str | Path | None) -> None:
    known = [f.name for f in fields(ExtractConfig)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
            raise UserError(f"{path or 'settings'}: unknown setting {name!r}, the nearest known one is {near[0]!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
