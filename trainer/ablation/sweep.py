"""A sweep: which runs it has, and what pins all of them to the same samples and questions.

SWEEP/sweep.json    what the runs share, each run's place on the axes, and the axes and settings that gave them; its
                    paths are those of `trainer/paths.py`, so a sweep can be moved with its store and LLM
SWEEP/runs/NAME/    a complete run, with the usual contract for resuming

Runs of unlike encoders are comparable only on the same clips. So every run gets the settings `clips_with`, all encoders
of the sweep, and `snapshot`: its samples and questions follow from these alone, wherever and whenever it is trained.
Imports no torch.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal, get_args

from featurestore import FeatureStore
from featurestore.encoder_keys import keys_of
from mervcache.config import overlay, to_builtin
from mervcache.errors import UserError, unknown_name
from mervcache.files import load_json, replace_text
from mervcache.reprs import was_and_is
from trainer.config import FUSIONS, PROJECTORS, SINGLE_ENCODER_FUSIONS, MaskRule, OptimizerConfig, TrainConfig
from trainer.loop.stages import STAGES_KEY, merge_settings
from trainer.paths import PATH_SETTINGS, found_path, recorded_path
from trainer.recipes import Stage, Stages
from trainer.runs.stage_folders import settings_by_stage

FORMAT = 1
SWEEP_FILE, RUNS_FOLDER = "sweep.json", "runs"
ALL, LEAVE_ONE_OUT, ALONE = "all", "leave-one-out", "alone"
SUBSET_RULES = (ALL, LEAVE_ONE_OUT, ALONE)
ONE_SHOT_MASKS: MaskRule = "sizes"  # draws the whole set and single encoders, which the table reads, more often
NESTED_NAME, NESTED_PROJECTOR = "nested-grids", "2d-average"  # begins the name of a run; its projector
SECTION = "sweep"  # of a config file, and of an entry of the record's `axes`: the axes, next to settings of all runs
NOT_COMPARED = ("mode", "is_trained")  # of a run's entry: they follow from its encoders and settings
TEXT_ONLY = "text-only"  # the run without encoders: the empty subset

RETRAINED, ONE_SHOT, NESTED = "retrained", "one-shot", "one-shot, grids"
Method = Literal["retrained", "one-shot", "one-shot, grids"]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The axes of a sweep; every combination is a run. An empty axis keeps what the recipe and its settings say."""

    encoders: tuple[str, ...] = ()  # of the whole sweep, in their order; empty: all of the store
    subsets: tuple[str, ...] = (ALL,)  # rules in SUBSET_RULES, or encoders joined by "+": "dinov2+siglip"
    fusions: tuple[str, ...] = ()  # names in FUSIONS
    projectors: tuple[str, ...] = ()  # names in PROJECTORS
    grids: tuple[int, ...] = ()  # tokens per frame, squares: 1, 4, 16, 64
    rates: tuple[float, ...] = ()  # factors of all learning rates
    seeds: tuple[int, ...] = (0,)  # a run of every combination for each
    text_only: bool = True  # add the run without encoders, which Shapley values need
    one_shot: bool = False  # add a run of all encoders trained with random masks, scored on every subset
    nested_grids: tuple[int, ...] = ()  # add a run of all encoders trained at all these, scored at each
    post_hoc: bool = False  # score ordinary runs of all encoders on every subset too
    split: str = "heldout"  # split of the questions that score the runs

    def __post_init__(self) -> None:
        for axis in ("subsets", "fusions", "projectors", "grids", "nested_grids", "rates", "seeds"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise UserError(f"sweep: {axis} names a value twice: {', '.join(map(str, values))}")
        for what, names, known in (("fusion", self.fusions, FUSIONS), ("projector", self.projectors, PROJECTORS)):
            if unknown := [name for name in names if name not in known]:
                raise UserError(unknown_name(f"{what} in the sweep", unknown[0], known))
        if odd := [grid for grid in self.grids if grid < 1 or isqrt(grid) ** 2 != grid]:
            raise UserError(f"sweep: grids are tokens per frame, squares such as 1, 4, 16, 64; got {odd[0]}")
        if odd := [rate for rate in self.rates if rate <= 0]:
            raise UserError(f"sweep: rates are factors of the learning rates, above 0; got {odd[0]}")
        if not self.seeds or not self.subsets:
            raise UserError("sweep: a sweep has at least one seed and one subset")


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One combination."""

    name: str  # of its folder under `runs/`
    encoders: tuple[str, ...]  # in the order of the sweep; empty: text only
    fusion: str = ""
    projector: str = ""
    tokens_per_frame: int | None = None  # None: as stored, or as the projector decides
    rate: float = 1.0  # factor of the learning rates
    seed: int = 0
    mode: str = "frozen"
    is_trained: bool = True  # False: text only under a frozen LLM, which is scored as it is
    method: Method = RETRAINED
    is_masked: bool = False  # also scored with every subset of its encoders
    nested_grids: tuple[int, ...] = ()  # tokens per frame at each of which it is scored
    stages: Stages = ()  # complete settings

    def to_record(self) -> dict[str, Any]:
        """Its entry in `sweep.json`."""
        record = to_builtin(asdict(replace(self, stages=())))
        left_out = {"name", "stages", "is_masked"} | (set() if self.nested_grids else {"nested_grids"})
        return {name: value for name, value in record.items() if name not in left_out}


def expand_subsets(rules: Sequence[str], encoders: Sequence[str]) -> list[tuple[str, ...]]:
    """The subsets of `encoders` that the rules name, each once: the smallest first, in the order of the encoders.

    >>> expand_subsets(["leave-one-out"], ["a", "b"])
    [('a',), ('b',), ('a', 'b')]
    """
    found: set[tuple[str, ...]] = set()
    whole = tuple(encoders)
    for rule in rules:
        if rule == ALL:
            sizes = range(1, len(whole) + 1)
            found.update(itertools.chain.from_iterable(itertools.combinations(whole, size) for size in sizes))
        elif rule == LEAVE_ONE_OUT:
            found.update([whole, *(part for part in itertools.combinations(whole, len(whole) - 1) if part)])
        elif rule == ALONE:
            found.update((encoder,) for encoder in whole)
        else:
            names = [name.strip() for name in rule.split("+")]
            if unknown := [name for name in names if name not in whole]:
                raise UserError(unknown_name("subset or encoder in --subsets", unknown[0], [*SUBSET_RULES, *whole]))
            found.add(tuple(encoder for encoder in whole if encoder in names))
    return sorted(found, key=lambda subset: (len(subset), [whole.index(encoder) for encoder in subset]))


def with_keys(rules: Sequence[str], store: FeatureStore) -> tuple[str, ...]:
    """Rules for subsets with every encoder by its key in the store; a name that stands for no or several stays."""

    def key(name: str) -> str:
        found = keys_of(name, store.encoders)
        return found[0] if len(found) == 1 else name

    named = ["+".join(key(name.strip()) for name in rule.split("+")) for rule in rules]
    return tuple(rule if rule in SUBSET_RULES else given for rule, given in zip(rules, named, strict=True))


def plan_runs(
    sweep: SweepConfig, stages: Stages, *, encoders: Sequence[str], snapshot: str, time_steps: int
) -> list[SweepRun]:
    """Every run of the sweep: text only first, then the subsets by size.

    `stages` are the recipe's with all settings but the axes, `encoders` those of the whole sweep, `time_steps` those of
    a stored clip. A fusion that reads one encoder makes runs of single encoders only, a projector that decides its grid
    one run for all grids.
    """
    config = stages[-1].config
    if any(stage.config.mask_encoders != "none" or stage.config.projector.nested_grids for stage in stages):
        raise UserError(
            "mask_encoders and projector.nested_grids would hold for every run of the sweep: leave them out, and give"
            " --one-shot or --nested-grids for runs of their own"
        )
    shape = (config.projector.resampler, config.projector.frame_divisor)
    rows = [row for row, preset in PROJECTORS.items() if (preset.resampler, preset.frame_divisor) == shape]
    own_projector = rows[0] if rows else config.projector.resampler
    own_grid = None if config.projector.grid is None else prod(config.projector.grid[1:])
    grids, whole = sweep.grids or (own_grid,), tuple(encoders)
    time = config.projector.grid[0] if config.projector.grid else time_steps
    subsets = expand_subsets(sweep.subsets, encoders)
    if sweep.post_hoc and whole not in subsets:
        raise UserError(f"--post-hoc scores runs of all encoders, and no subset is {'+'.join(whole)}: add it")
    if sweep.nested_grids and NESTED_PROJECTOR not in (sweep.projectors or (own_projector,)):
        raise UserError(f"--nested-grids trains with projector {NESTED_PROJECTOR}: add it to the projectors")
    one_shot = [whole] if (sweep.one_shot or sweep.nested_grids) and whole not in subsets else []
    pins = {"clips_with": list(encoders), "snapshot": snapshot}
    runs = []
    for rate, seed in itertools.product(sweep.rates or (1.0,), sweep.seeds):
        ending = [*([f"rate{rate:g}"] if rate != 1 else []), f"seed{seed}"]
        common = {**pins, "seed": seed}
        if sweep.text_only:
            is_trained = config.train_llm != "none"
            settings = {**common, "encoders": list(encoders), **({"mode": TEXT_ONLY} if is_trained else {})}
            runs.append(
                SweepRun(
                    name="__".join([TEXT_ONLY, *ending]),
                    encoders=(),
                    rate=rate,
                    seed=seed,
                    mode=TEXT_ONLY,
                    is_trained=is_trained,
                    stages=scale_rates(merge_settings(stages, {}, settings), rate),
                )
            )
        for subset, fusion, projector, grid in itertools.product(
            [*subsets, *one_shot],
            sweep.fusions or (config.fusion.name,),
            sweep.projectors or (own_projector,),
            grids,
        ):
            if fusion in SINGLE_ENCODER_FUSIONS and len(subset) > 1:
                continue
            if not PROJECTORS.get(projector, config.projector).takes_grid:
                if grid != grids[0]:
                    continue
                grid = None
            settings = {**common, "encoders": list(subset), "fusion": {"name": fusion}}
            if projector != own_projector:
                preset = PROJECTORS[projector]
                settings["projector"] = {"resampler": preset.resampler, "frame_divisor": preset.frame_divisor}
                if not preset.takes_grid:
                    settings["projector"]["grid"] = None
            if grid is not None and sweep.grids:
                settings["projector"] = settings.get("projector", {}) | {"grid": [time, isqrt(grid), isqrt(grid)]}
            parts = ["+".join(subset), fusion, projector, "stored" if grid is None else str(grid), *ending]
            axes = {"encoders": subset, "fusion": fusion, "projector": projector, "tokens_per_frame": grid}
            mixes = subset == whole and fusion not in SINGLE_ENCODER_FUSIONS
            ordinary = SweepRun(
                name="__".join(parts),
                **axes,
                rate=rate,
                seed=seed,
                is_masked=sweep.post_hoc and mixes,
                stages=scale_rates(merge_settings(stages, {}, settings), rate),
            )
            runs += [ordinary] if subset in subsets else []
            runs += [_one_shot(ordinary)] if sweep.one_shot and mixes else []
            if sweep.nested_grids and subset == whole and projector == NESTED_PROJECTOR and grid == grids[0]:
                runs.append(_nested(ordinary, sweep.nested_grids, time))
    return sorted(runs, key=lambda run: len(run.encoders))


def _one_shot(run: SweepRun) -> SweepRun:
    """The run that learns under masks, with the settings of an ordinary one."""
    stages = tuple(replace(s, config=replace(s.config, mask_encoders=ONE_SHOT_MASKS)) for s in run.stages)
    name = "__".join([ONE_SHOT, *run.name.split("__")[1:]])
    return replace(run, name=name, method=ONE_SHOT, is_masked=True, stages=stages)


def _nested(run: SweepRun, grids: tuple[int, ...], time: int) -> SweepRun:
    """The run that learns at several grids, with the settings of an ordinary one."""
    side = isqrt(max(grids))
    settings = {"projector": {"nested_grids": list(grids), "grid": [time, side, side]}}
    _, fusion, projector, _, *ending = run.name.split("__")
    return replace(
        run,
        name="__".join([NESTED_NAME, fusion, projector, "-".join(map(str, grids)), *ending]),
        method=NESTED,
        is_masked=False,
        tokens_per_frame=None,
        nested_grids=grids,
        stages=merge_settings(run.stages, {}, settings),
    )


def scale_rates(stages: Stages, factor: float) -> Stages:
    """The stages with every learning rate times `factor`, and the published ones that the samples decide."""

    def scaled(config: TrainConfig) -> TrainConfig:
        names = [field.name for field in fields(OptimizerConfig) if field.name.endswith("_lr")]
        optimizer = replace(config.optimizer, **{name: factor * getattr(config.optimizer, name) for name in names})
        rates = {name: factor * rate for name, rate in config.by_samples.items() if name.startswith("optimizer.")}
        return replace(config, optimizer=optimizer, by_samples={**config.by_samples, **rates})

    return stages if factor == 1 else tuple(replace(stage, config=scaled(stage.config)) for stage in stages)


def run_folder(sweep: Path, run: SweepRun | str) -> Path:
    """Where a run of the sweep is."""
    return Path(sweep) / RUNS_FOLDER / (run if isinstance(run, str) else run.name)


def read_sweep(sweep: Path) -> dict[str, Any]:
    """The record of a sweep, its paths as `found_path`.

    UserError for a folder that holds none, or one whose runs cannot be compared.
    """
    path = Path(sweep) / SWEEP_FILE
    if not path.is_file():
        raise UserError(f"{sweep} is no sweep: it has no {SWEEP_FILE}; give the folder of merv-train sweep --out")
    record = load_json(path.read_bytes(), str(path))
    try:
        _check_record(record)
        return _with_paths(record, lambda path: found_path(path, Path(sweep)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"entry {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is no record of a sweep that can be compared: {reason}") from error


def _with_paths(record: Mapping[str, Any], path_of: Callable[[str], str]) -> dict[str, Any]:
    """A record with the paths in it changed: of the store, and in the settings of every stage."""

    def changed(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        return {**values, **{name: path_of(values[name]) for name in names if isinstance(values.get(name), str)}}

    def by_stage(stages: Mapping[str, Any]) -> dict[str, Any]:
        return {stage: changed(settings, PATH_SETTINGS) for stage, settings in stages.items()}

    found = changed(record, ["store"])
    if "settings" in record:
        found["settings"] = by_stage(record["settings"])
    if "axes" in record:
        found["axes"] = [{**entry, STAGES_KEY: by_stage(entry[STAGES_KEY])} for entry in record["axes"]]
    return found


def _check_record(record: Any) -> None:
    if record["format"] != FORMAT:
        raise ValueError(f"its format is {record['format']!r}, this version reads {FORMAT}")
    names, split, seen = record["encoders"], record["split"], {}
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in [*names, split]):
        raise ValueError(f"encoders are different names and the split is one, got {names} and {split!r}")
    for run, entry in record["runs"].items():
        if not re.fullmatch(r"[\w@+.,=-]+", run) or set(run) == {"."}:
            raise ValueError(f"{run!r} is no name of a run's folder")
        if unknown := [name for name in entry["encoders"] if name not in names]:
            raise ValueError(f"run {run} has encoder {unknown[0]!r}, the sweep has {', '.join(names)}")
        if entry["method"] not in get_args(Method) or not isinstance(entry["seed"], int):
            raise ValueError(f"run {run} has method {entry['method']!r} and seed {entry['seed']!r}")
        settings = {name: value for name, value in entry.items() if name not in ("encoders", *NOT_COMPARED)}
        place = json.dumps([sorted(entry["encoders"]), settings], sort_keys=True)
        if (other := seen.setdefault(place, run)) != run:
            raise ValueError(f"runs {other} and {run} have the same encoders, settings and seed")


def resume_command(sweep: Path) -> str:
    """The command line that computes what a sweep lacks."""
    command, record = f"merv-train sweep --out {shlex.quote(str(sweep))}", read_sweep(sweep)
    return command if record.get("axes") else f"{command}, with the options it was begun with"


def recorded_axes(record: Mapping[str, Any]) -> list[tuple[SweepConfig, Stages]]:
    """The axes and settings by which a sweep's runs were planned, in turn; none before they were recorded."""
    found = []
    for entry in record.get("axes", []):
        by_stage = entry[STAGES_KEY].items()
        stages = tuple(Stage(name=name, config=overlay(TrainConfig(), settings)) for name, settings in by_stage)
        found.append((overlay(SweepConfig(), entry[SECTION]), stages))
    return found


def axes_entry(sweep: SweepConfig, stages: Stages) -> dict[str, Any]:
    """What `recorded_axes` reads."""
    return {SECTION: to_builtin(asdict(sweep)), STAGES_KEY: settings_by_stage(stages)}


def add_to_record(
    sweep: Path, pins: Mapping[str, Any], axes: Sequence[Mapping[str, Any]], runs: Sequence[SweepRun], *, store: str
) -> dict[str, Any]:
    """Write the sweep's record, or add axes and runs to it; UserError where it was begun with other pins.

    Runs that are in the record stay in it, whether they are in `runs` or not. `store` is where the store is now: the
    snapshot among the pins decides which one it is.
    """
    path, recorded = Path(sweep) / SWEEP_FILE, dict[str, str]()  # a path as it is found now -> as the file has it
    record: dict[str, Any] = {"format": FORMAT, "store": store, **pins, "axes": [], "runs": {}}
    if path.exists():
        record = {"axes": [], **read_sweep(sweep)}
        before, now = (_comparable({name: values.get(name) for name in pins}) for values in (record, pins))
        if before != now:
            old, new = _leaves(before), _leaves(now)
            changed = [name for name in old | new if old.get(name) != new.get(name)]
            values = "; ".join(was_and_is(name, old.get(name), new.get(name)) for name in changed)
            raise UserError(
                f"{sweep} was begun with other values ({values}), and runs of one sweep are compared with each other:"
                " give the same, or another --out"
            )
        as_written = load_json(path.read_bytes(), str(path))
        _with_paths(as_written, lambda old: recorded.setdefault(found_path(old, Path(sweep)), old))
    record["store"] = store
    record["axes"] += [entry for entry in axes if entry not in record["axes"]]
    record["runs"] |= {run.name: run.to_record() for run in runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = _with_paths(record, lambda found: recorded.get(found) or recorded_path(found, Path(sweep)))
    replace_text(path, json.dumps(written, indent=1) + "\n")
    return record


def _comparable(pins: Mapping[str, Any]) -> dict[str, Any]:
    """The pins with one spelling of each file and folder."""
    return _with_paths(pins, lambda path: os.path.realpath(path) if os.path.exists(path) else path)


def shared_settings(stages: Stages) -> dict[str, Any]:
    """The settings that all runs of a sweep have in common, by stage: all but the axes."""
    settings = {}
    for stage in stages:
        shared = to_builtin(asdict(stage.config))
        for name in ("encoders", "fusion", "seed", "mode", "mask_encoders", "clips_with", "snapshot"):
            del shared[name]
        for name in ("resampler", "grid", "frame_divisor", "nested_grids"):
            del shared["projector"][name]
        shared["by_samples"] = list(stage.config.undecided)
        settings[stage.name] = shared
    return settings


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The values of nested mappings by their own name: `{"settings": {"finetune": {"seed": 1}}}` -> `{"seed": 1}`."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {leaf: found for key, nested in value.items() for leaf, found in _leaves(nested, key).items()}
