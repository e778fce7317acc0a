"""`ExtractConfig`: every setting of an extraction as one checked value, from a YAML file and the command line.

An unknown key is an error that names the nearest known one: an ignored misspelling costs a night on a cluster.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from featurestore.clips import KINDS
from featurestore.identity import FeatureIdentity
from featurestore.layout import check_block_rows
from featurestore.locate import Place, names_of, place_of
from featurestore.storage_dtypes import STORAGE_DTYPES
from jobs.settings import ClusterRequest, ClusterSettings
from mervcache.config import check_names, check_types, load_yaml, to_builtin
from mervcache.errors import ClusterError, UserError, unknown_name
from mervcache.reprs import changed_fields
from mervcache.text import redact_all
from pipeline.align import DEFAULT_GRID
from pipeline.encoders.base import EncoderSpec, Grid, feature_identity, layer_text
from pipeline.encoders.registry import ENCODERS, MERV_ENCODERS, encoder_name, encoder_spec
from pipeline.encoders.weights import check_weights_spec

COMPUTE_DTYPES = ("float32", "bfloat16")
DECODER_NAMES = ("frames/1", "decord", "ffmpeg")  # of `decode.decoders.DECODERS`, which loads too much for --help
WINDOW, MAX_WINDOW, MAX_FPS = 16, 4096, 1000  # frames of a window by default; limits
AUTO = 0  # "choose for the machine"
RUN_ONLY_SETTINGS = frozenset(  # of one run and its cluster; not reused when a run is repeated from its journal
    "new_identity refresh retry_quarantine retry_reason reuse forecast dashboard performance_report".split()
    + "scheduler workers cluster".split()
)
BY_ENCODER = ("weights", "architecture", "crop", "frame_rule", "frame_dtype", "grids", "layers")  # keys: encoders
DEFAULT_BATCH = {"cpu": {"video": 2, "image": 8}, "cuda": {"video": 8, "image": 64}}  # clips per forward


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What decides an encoder's features; small and picklable, workers load encoders from it."""

    name: str
    weights: str = "hub"  # hub | a folder | random:SEED
    architecture: Mapping[str, Any] = field(default_factory=dict)  # sizes other than the published ones
    crop: str | None = None  # squash | centre-crop; None: the encoder's own, as published
    frame_rule: str | None = None  # "linspace-16"; None: that of a model with several encoders, "linspace-32/K"
    frame_dtype: str = "uint8"  # float32: frames are not rounded after an interpolation without antialias
    exif: str = "ignore"  # apply: rotate still pictures by their EXIF orientation
    grid: tuple[int, int, int] | None = DEFAULT_GRID  # T, H, W of the stored tokens; None: the encoder's own grid
    prefix_tokens: bool = False  # also store class and register tokens
    compute_dtype: str = "bfloat16"  # as princetonvisualai/merv runs them
    storage_dtype: str = "float16"
    decoder: str = "frames/1"
    layer: str | None = None  # "12", "-1" or "12+norm"; None: the encoder's own
    label: str = ""  # in a run with several grids or layers of the encoder: "dinov2@16x8x8"

    @property
    def key(self) -> str:
        """What a run calls this encoder: its name, where it has one grid and one layer."""
        return self.label or self.name

    @classmethod
    def of_identity(cls, identity: FeatureIdentity, weights: str) -> EncoderSettings:
        """Settings that give this identity, if the weights are the same."""
        return cls(
            name=identity.encoder,
            weights=weights,
            architecture={key: value for key, value in identity.architecture.items() if key != "model"},
            crop=identity.preprocessing.get("fit"),
            frame_rule=identity.frame_rule,
            frame_dtype=identity.preprocessing.get("dtype", "uint8"),
            exif=identity.preprocessing.get("exif", "ignore"),
            grid=None if identity.pooling == "none" else identity.grid,
            prefix_tokens=identity.prefix_tokens > 0,
            compute_dtype=identity.compute_dtype,
            storage_dtype=identity.storage_dtype,
            decoder=identity.decode,
            layer=layer_text(identity.layer),
        )

    @property
    def spec(self) -> EncoderSpec:
        """The encoder's declaration at these sizes, with these frames."""
        spec = encoder_spec(self.name).with_architecture(self.architecture)
        spec = spec.with_crop(self.crop) if self.crop else spec
        spec = spec.with_frame_rule(self.frame_rule) if self.frame_rule else spec
        spec = spec.with_layer(self.layer) if self.layer else spec
        return spec.with_frame_dtype(self.frame_dtype).with_exif(self.exif)

    def identity(self, weights_sha256: str) -> FeatureIdentity:
        """What decides the bytes of the tokens, given what the weights hash to."""
        spec = self.spec
        return feature_identity(
            spec,
            weights_sha256=weights_sha256,
            compute_dtype=self.compute_dtype,
            decode=self.decoder,
            grid=self.grid,
            prefix_tokens=self.prefix_tokens and spec.prefix_tokens > 0,  # SigLIP, for one, has none
            storage_dtype=self.storage_dtype,
        )


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What one worker loads and starts; small and picklable."""

    encoders: tuple[EncoderSettings, ...]
    device: str = "auto"
    threads: int = AUTO  # torch threads; decides the last bits of a sum, so it is fixed for a store
    decode_processes: int = AUTO
    decode_timeout_s: float = 60.0
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Every setting of `merv-pipeline extract`; the first part decides bytes, the rest only speed and place.

    Short forms are those of a config file: `weights="random:0"` for all encoders, likewise `crop`, `frame_rule` and
    `frame_dtype`; `encoders="dinov2,siglip"`; `grid="raw"`, `"8,4,4"` or a list, and `grid="8x8,4x4,raw"` for `grids`.
    The fields hold the long forms.
    """

    dataset: str  # by name; `merv-pipeline datasets` lists them
    root: str | None = None  # folder of the media and annotations; None: the dataset's own default
    options: Mapping[str, Any] = field(default_factory=dict)  # the dataset's own options
    store: str | None = None  # None: features/DATASET.zarr
    stage: str | None = None  # align | finetune | None: all
    kind: str | None = None  # video | image | None: all
    limit: int | None = None  # only the first clips of the listing
    samples: bool = True  # store the annotations; False if a licence forbids copying them
    canaries: bool = True  # store tokens of the reference clips, for `verify --parity`
    encoders: tuple[str, ...] = MERV_ENCODERS  # by name; `merv-pipeline encoders` lists them
    weights: Mapping[str, str] = field(default_factory=dict)  # encoder -> SPEC; "" applies to all others
    architecture: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # encoder -> sizes
    crop: Mapping[str, str] = field(default_factory=dict)  # encoder -> squash | centre-crop; "" is for all
    frame_rule: Mapping[str, str] = field(default_factory=dict)  # encoder -> linspace-16, +times, ...; "" is for all
    frame_dtype: Mapping[str, str] = field(default_factory=dict)  # encoder -> uint8 | float32
    fps: float | None = None  # split videos into windows of frames at this rate; None: one clip per video, evenly
    window: int | None = None  # frames of a window, which is window / fps seconds long; None: 16 with fps
    exif: str = "ignore"  # apply: rotate still pictures by their EXIF orientation
    upsample: bool = False  # let rows and columns of the grid be more than an encoder's own: adaptive windows overlap
    grid: tuple[int, int, int] | None = DEFAULT_GRID  # T, H, W of the stored tokens; raw: each encoder's own grid
    grids: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # encoder -> several: 16x8x8, 4x4, raw; "": all
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # encoder -> one or several: 12, -1, 12+norm
    prefix_tokens: bool = False  # store class and register tokens too, of the encoders that have them
    compute_dtype: str = "bfloat16"  # as princetonvisualai/merv runs them
    storage_dtype: str = "float16"  # float16 | bfloat16 | uint8
    decoder: str = "frames/1"  # frames/1 is frame-exact; decord | ffmpeg for parity with published work
    accept_damaged: bool = False  # use the decodable frames of damaged files
    block_rows: Mapping[str, int] = field(default_factory=dict)  # kind -> clips per block, fixed at creation
    batch: Mapping[str, int] = field(default_factory=dict)  # kind -> clips per forward; absent: fitted to memory
    reuse: str | None = None  # another store: copy its tokens of the same media
    new_identity: bool = False  # store changed features alongside the existing ones
    refresh: bool = False  # compute clips again whose media changed since their tokens were stored
    retry_quarantine: bool = False  # retry clips that failed before
    retry_reason: str | None = None  # retry only clips whose reason contains this text
    scheduler: str = "local"  # local | cuda | slurm | tcp://HOST:PORT | a scheduler file
    workers: int = AUTO  # 0: one; with cuda, or jobs of several GPUs, one per GPU
    cluster: Mapping[str, Any] = field(default_factory=dict)  # jobs.settings.ClusterSettings, for cuda and slurm
    device: str = "auto"  # auto: cuda where torch sees one, else cpu
    threads: int = AUTO  # torch threads per worker
    compiled: bool = False  # encoders by torch.compile, without autotuning: other last bits; recorded in the journal
    decode_processes: int = AUTO  # per worker; its share of the host's cores
    decode_timeout_s: float = 60.0  # seconds for one clip, after which its decoder is killed
    max_failed: float = 0.5  # stop when more than this share failed, and at least 32 clips
    forecast: str | None = None  # output file of `plan --json`, recorded in the journal
    dashboard: bool = False  # start Dask's dashboard
    gpu_cost: float | None = None  # of a GPU's hour, in any currency; on CPUs of a worker's hour
    performance_report: str | None = None  # HTML file; None: next to the store with a dashboard, else none

    def __post_init__(self) -> None:
        short = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in _normalized(short).items():
            if value is not short[name]:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "grid", _checked_grid(self.grid))
        object.__setattr__(self, "encoders", _checked_encoders(self.encoders))
        check_types(self)
        choices = {"storage_dtype": STORAGE_DTYPES, "compute_dtype": COMPUTE_DTYPES, "decoder": DECODER_NAMES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for setting in BY_ENCODER:  # may name encoders that this run does not use
            for name in getattr(self, setting):
                if name != "" and name not in ENCODERS:
                    raise UserError(f"{setting}: {unknown_name('encoder', name, ENCODERS)}")
        for setting in ("batch", "block_rows"):
            for kind in getattr(self, setting):
                if kind not in KINDS:
                    raise UserError(f"{setting}: {unknown_name('kind', kind, KINDS)}")
        for kind, clips in self.batch.items():
            if not isinstance(clips, int) or isinstance(clips, bool) or clips < 1:
                raise UserError(f"batch of {kind} must be a whole number of clips of at least 1, got {clips!r}")
        self._check_windows()
        for settings in self.encoder_settings:  # fail on a misspelt size now, not after listing a million clips
            _ = settings.spec
            check_weights_spec(settings.weights)
        check_block_rows(self.block_rows)
        _ = self.cluster_request  # checked where it is made
        if self.gpu_cost is not None and not 0 <= self.gpu_cost < math.inf:
            raise UserError(f"gpu_cost is the price of an hour, at least 0, got {self.gpu_cost}")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"max_failed is a share between 0 and 1, got {self.max_failed}")

    __repr__ = changed_fields

    @property
    def store_path(self) -> Place:
        """The store: a folder, or the URL as it was given."""
        return place_of(self.store or f"features/{self.dataset}.zarr")

    def _check_windows(self) -> None:
        if self.fps is None:
            if self.window is not None:
                raise UserError(f"window {self.window} is a number of frames at a rate: give fps too, such as --fps 1")
            if by_rate := [text for text in self.frame_rule.values() if text.startswith("rate-")]:
                raise UserError(
                    f"frame rule {by_rate[0]} is that of windows, which fps and window make: --fps 1 --window 16"
                )
            return
        if not 0 < self.fps <= MAX_FPS or Fraction(str(self.fps)).denominator > 10**6:
            raise UserError(f"fps is above 0, up to {MAX_FPS}, of at most 6 decimals, got {self.fps}")
        if self.window is not None and not 1 <= self.window <= MAX_WINDOW:
            raise UserError(f"window is a number of frames from 1 to {MAX_WINDOW}, got {self.window}")
        if self.frame_rule:
            raise UserError("frame_rule and fps both choose the frames: leave one of them out")

    @property
    def window_length(self) -> Fraction | None:
        """Seconds of a window; None where videos are not split."""
        return None if self.fps is None else (self.window or WINDOW) / Fraction(str(self.fps))

    def _frame_rule(self, name: str) -> str | None:
        """The rule that the config names; with windows the encoder's own number of frames, evenly over a window."""
        if self.window_length is None:
            return self.frame_rule.get(name, self.frame_rule.get(""))
        own = encoder_spec(name).with_architecture(self.architecture.get(name, {}))
        return str(own.chosen_frames.at_rate(own.num_frames / self.window_length))

    @property
    def encoder_settings(self) -> tuple[EncoderSettings, ...]:
        """One value per identity: the encoders in their order, each with its layers and grids."""
        return tuple(variant for name in self.encoders for variant in self._variants(name))

    def _variants(self, name: str) -> list[EncoderSettings]:
        base = EncoderSettings(
            name=name,
            weights=self.weights.get(name, self.weights.get("", "hub")),
            architecture=self.architecture.get(name, {}),
            crop=self.crop.get(name, self.crop.get("")),
            frame_rule=self._frame_rule(name),
            frame_dtype=self.frame_dtype.get(name, self.frame_dtype.get("", "uint8")),
            exif=self.exif,
            grid=self.grid,
            prefix_tokens=self.prefix_tokens,
            compute_dtype=self.compute_dtype,
            storage_dtype=self.storage_dtype,
            decoder=self.decoder,
        )
        layers = self.layers.get(name, self.layers.get("", ()))
        texts = self.grids.get(name, self.grids.get("", ()))
        grids = [_grid_of(text, base.spec) for text in texts] or [self.grid]
        variants = [replace(base, layer=layer, grid=grid) for layer in layers or (None,) for grid in grids]
        if len(variants) == 1:
            return variants
        specs = [(each.spec.layer, each.grid) for each in variants]
        if twice := [each for each in specs if specs.count(each) > 1]:
            raise UserError(f"{name} is asked for twice: {twice[0][0]}, grid {grid_text(twice[0][1])}")
        return [replace(each, label=_label(each, len(layers) > 1, len(grids) > 1)) for each in variants]

    @property
    def engine_settings(self) -> EngineSettings:
        """What every worker of the run loads."""
        return EngineSettings(
            encoders=self.encoder_settings,
            device=self.device,
            threads=self.threads,
            decode_processes=self.decode_processes,
            decode_timeout_s=self.decode_timeout_s,
            compiled=self.compiled,
        )

    @property
    def cluster_request(self) -> ClusterRequest:
        """The cluster that the run uses."""
        try:
            return ClusterRequest(
                scheduler=self.scheduler,
                num_workers=self.workers,
                device=self.device,
                dashboard=self.dashboard or self.performance_report is not None,
                settings=ClusterSettings.from_mapping(self.cluster),
            )
        except ClusterError as error:
            raise UserError(str(error)) from error

    def check_grids(self) -> None:
        """UserError for a grid that would repeat places of an encoder's own, unless `upsample` is set."""
        for settings in self.encoder_settings if not self.upsample else ():
            own, grid = settings.spec.grid, settings.grid
            if grid is not None and (grid[1] > own[1] or grid[2] > own[2]):
                raise UserError(
                    f"grid {grid_text(grid)} is finer than the {grid_text(own)} of {settings.name}: it would hold"
                    " places twice. Store the encoders' own grids with --grid raw, from which merv-train --projector"
                    " 2d-average-upsampled makes the same tokens; or give --upsample"
                )

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain values."""
        return asdict(self)

    def to_yaml(self) -> str:
        """Every setting, as `read_config` takes it back; addresses without their credentials."""
        import yaml

        plain = to_builtin(self.to_dict())
        if self.grid is None:
            plain["grid"] = "raw"
        return yaml.safe_dump(redact_all(plain), sort_keys=False)


def read_config(path: str | Path | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> ExtractConfig:
    """An `ExtractConfig` from a YAML file at `path`, or a mapping of its content, with `overrides` merged in.

    None as `path`: the overrides alone; None as a value: not given. UserError for unknown keys and wrong values.
    """
    settings = _normalized(path if isinstance(path, Mapping) else load_yaml(path)) if path else {}
    given = _normalized({name: value for name, value in overrides.items() if value is not None})
    if "grid" in given or "grids" in given:  # one grid replaces several, and several replace one
        settings = {name: value for name, value in settings.items() if name not in ("grid", "grids")}
    for name, value in given.items():
        merges = isinstance(value, Mapping) and isinstance(settings.get(name), Mapping)
        settings[name] = {**settings[name], **value} if merges else value
    check_names(ExtractConfig, settings, source=f"{path}: " if isinstance(path, str | Path) else "settings: ")
    if "dataset" not in settings:
        raise UserError("which dataset? give --dataset NAME; `merv-pipeline datasets` lists them")
    return ExtractConfig(**settings)


def default_batch(device: str, kind: str) -> int:
    """Clips per forward that suit a device such as "cuda:1"."""
    return DEFAULT_BATCH.get(device.split(":")[0], DEFAULT_BATCH["cpu"])[kind]


def _normalized(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Expand short forms: one SPEC for all encoders, names with commas, a grid as text."""
    long = dict(settings)
    for name in ("weights", "crop", "frame_rule", "frame_dtype"):
        if isinstance(long.get(name), str):
            long[name] = {"": long[name]}
    if isinstance(long.get("encoders"), str):
        long["encoders"] = names_of(long["encoders"])
    if isinstance(names := long.get("encoders"), list | tuple):
        long["encoders"] = [encoder_name(name) if isinstance(name, str) else name for name in names]
    for name in BY_ENCODER:
        if isinstance(values := long.get(name), Mapping) and any(str(key).startswith("timm:") for key in values):
            long[name] = {encoder_name(str(key)): value for key, value in values.items()}
    for name in ("grids", "layers"):
        if isinstance(values := long.get(name), str | int | list | tuple):
            values = {"": values}
        if isinstance(values, Mapping):
            long[name] = {key: _texts(value) for key, value in values.items()}
    if isinstance(grid := long.get("grid"), str):
        parts = names_of(grid)
        if grid == "raw":
            long["grid"] = None
        elif parts and all(number.isdecimal() for number in parts):
            long["grid"] = [int(number) for number in parts]
        elif parts and all(_GRID.fullmatch(part) for part in parts):
            long["grids"] = {**long.get("grids", {}), "": tuple(parts)}
            del long["grid"]
    return long


def _texts(value: Any) -> Any:
    """A list of texts from one, from numbers, or from a list of either."""
    listed = names_of(value) if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
    return tuple(str(each) if isinstance(each, int) and not isinstance(each, bool) else each for each in listed)


_GRID = re.compile(r"raw|(?:([1-9]\d{0,3})x)?([1-9]\d{0,3})x([1-9]\d{0,3})")


def _grid_of(text: str, spec: EncoderSpec) -> Grid | None:
    """The grid of `16x8x8`, of `8x8` with all of the encoder's time steps, or of `raw`, which is None."""
    match = _GRID.fullmatch(text)
    if match is None:
        raise UserError(f"a grid is TxHxW such as 16x8x8, HxW such as 8x8, or raw, got {text!r}")
    return None if text == "raw" else (int(match[1] or spec.grid[0]), int(match[2]), int(match[3]))


def grid_text(grid: Grid | None) -> str:
    """`16x8x8`, or `raw` for the encoder's own grid."""
    return "raw" if grid is None else "x".join(map(str, grid))


def _label(settings: EncoderSettings, has_layers: bool, has_grids: bool) -> str:
    parts = [grid_text(settings.grid)] if has_grids else []
    parts += [f"layer{settings.layer}"] if has_layers else []
    return "@".join([settings.name, *parts]) if parts else ""


def _checked_grid(grid: Any) -> tuple[int, int, int] | None:
    if grid is None:
        return None
    numbers = tuple(grid) if isinstance(grid, list | tuple) else ()
    if len(numbers) != 3 or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in numbers):
        raise UserError(
            f"grid is three whole numbers T, H, W of at least 1, or raw, got {grid!r}; several are 16x8x8,4x4,raw"
        )
    return numbers


def _checked_encoders(names: Any) -> tuple[str, ...]:
    listed = tuple(names) if isinstance(names, list | tuple) else ()
    if not listed or len(set(map(str, listed))) < len(listed):
        raise UserError(f"encoders must be a list of different names, got {names!r}")
    for name in listed:
        if name not in ENCODERS:
            raise UserError(unknown_name("encoder", name, ENCODERS))
    return listed
