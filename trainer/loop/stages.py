"""Stages: settings laid over a recipe, and its stages trained one after another.

Comes in: a recipe, a config file, options. Goes out: finished runs. What a chain has done is read from its folders, so
resuming it is calling it again. torch is imported where training begins: the command line reads this room for `--help`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from featurestore.clips import Sample
from mervcache.config import overlay, plain
from mervcache.errors import UserError, unknown_name
from mervcache.files import replace_text
from trainer.config import CONFIG_FILE, Stage, Stages, TrainConfig, read_config
from trainer.loop.launch import is_first_rank
from trainer.runs.stage_folders import STAGES_FILE, check_is_free, stage_folder

if TYPE_CHECKING:
    from trainer.data.tokens import TokenSource
    from trainer.loop.train import TrainResult

OWN = "stages"  # key of a config file that holds the settings of single stages

# Settings, and the folder of a run that may have begun with them -> its samples and tokens.
OpenTokens = Callable[[TrainConfig, Path | None], "tuple[Sequence[Sample], TokenSource]"]


def merge_settings(stages: Stages, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Stages:
    """A recipe, then a file's settings, then those the file has for one stage, then options: later ones win.

    Of what is said for a whole chain, `init` is where its first stage starts, and `prompt` leaves a caption stage as it
    is. One overlay for all layers: a file may name a frozen LLM that only `--train-llm full` makes sense of.
    """
    own = settings.get(OWN) or {}
    if not isinstance(own, Mapping) or not all(isinstance(value, Mapping) for value in own.values()):
        raise UserError(f"setting {OWN} is a mapping of stage names to settings, got {own!r}")
    names = [stage.name for stage in stages]
    if unknown := [name for name in own if name not in names]:
        raise UserError(unknown_name(f"stage in {OWN}", unknown[0], names))
    common = {name: value for name, value in settings.items() if name != OWN}
    if len(stages) > 1 and "stage" in common:
        raise UserError(f"this recipe has its own stages, {', '.join(names)}: say `stage` under `{OWN}: {{NAME: ...}}`")
    laid = []
    for index, stage in enumerate(stages):
        kept = _kept(stage, index) if len(stages) > 1 else set()
        layers = [_without(common, kept), own.get(stage.name, {}), _without(options, kept)]
        laid.append(replace(stage, config=overlay(stage.config, _merge(layers))))
    return tuple(laid)


def train_stages(
    stages: Stages,
    open_tokens: OpenTokens,
    out: Path,
    *,
    store: str = "",
    resume: bool = False,
    only: str | None = None,
    quiet: bool = False,
) -> list[TrainResult]:
    """Train the stages in turn, or the one named `only`; a stage that is told to stop ends the chain.

    `open_tokens` gives the samples and the token source of a stage's settings.
    """
    from trainer.loop.train import train
    from trainer.runs.checkpoint import newest

    out = Path(out)
    chosen = _chosen(stages, only)
    _prepare_folder(out, stages, only, resume)
    is_new = newest(stage_folder(out, stages, stages[0])) is None  # a stage without checkpoint starts over
    words = _look_ahead(stages, open_tokens) if len(stages) > 1 and is_new else ()
    results: list[TrainResult] = []
    for stage in chosen:
        config, folder = _with_start(stages, stage, out), stage_folder(out, stages, stage)
        result = _finished(folder, config) if resume else None
        if result is None:
            samples, source = open_tokens(config, folder)
            result = train(config, samples, source, folder, store=store, resume=resume, words=words, quiet=quiet)
            # accelerate ties a model to itself: until it is collected, its memory and that of its optimizer are taken.
            gc.collect()
        results.append(result)
        if result.steps < result.num_steps:
            break
    return results


def describe_stages(stages: Stages, open_tokens: OpenTokens, *, store: str = "") -> dict[str, Any]:
    """What a dry run tells, of each stage where there are several; a later stage's start is not trained yet."""
    from trainer.loop.plan import describe, make_plan

    words = _look_ahead(stages, open_tokens) if len(stages) > 1 else ()
    told = {}
    for index, stage in enumerate(stages):
        samples, source = open_tokens(stage.config, None)
        told[stage.name] = describe(make_plan(stage.config, samples, source, store=store, words=words))
        if index and stage.config.init is None:
            told[stage.name]["init"] = f"all weights of stage {stages[index - 1].name}"
    return {OWN: told} if len(stages) > 1 else told[stages[0].name]


def to_yaml(stages: Stages) -> str:
    """A config file that gives these settings over any recipe of the same stages."""
    if len(stages) == 1:
        return stages[0].config.to_yaml()
    own = {stage.name: plain(asdict(stage.config)) for stage in stages}
    return yaml.safe_dump({OWN: own}, sort_keys=False)


def _kept(stage: Stage, index: int) -> set[str]:
    """Settings of a chain's stage that are not changed by what is said for the whole chain."""
    return {"stage"} | ({"init"} if index else set()) | ({"prompt"} if stage.config.prompt == "caption" else set())


def _without(settings: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _merge(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Later layers win; mappings are merged entry by entry."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            before = merged.get(name)
            both = isinstance(before, Mapping) and isinstance(value, Mapping)
            merged[name] = _merge([before, value]) if both else value
    return merged


def _chosen(stages: Stages, only: str | None) -> Stages:
    names = [stage.name for stage in stages]
    if only is not None and only not in names:
        raise UserError(unknown_name("stage of this recipe", only, names))
    return tuple(stage for stage in stages if only in (None, stage.name))


def _prepare_folder(out: Path, stages: Stages, only: str | None, resume: bool) -> None:
    """Refuse a folder that holds something else; write a chain's stages, on the first rank alone."""
    other = STAGES_FILE if len(stages) == 1 else CONFIG_FILE
    if (out / other).exists():
        held = "a chain of stages" if len(stages) == 1 else "a run of one stage"
        raise UserError(f"{out} holds {held}, which this recipe is not; choose another --out")
    if len(stages) == 1 or not is_first_rank():
        return
    if not resume:
        check_is_free(out, stages, only)
    out.mkdir(parents=True, exist_ok=True)
    settings = {stage.name: plain(asdict(stage.config)) for stage in stages}
    replace_text(out / STAGES_FILE, yaml.safe_dump(settings, sort_keys=False))


def _look_ahead(stages: Stages, open_tokens: OpenTokens) -> list[str]:
    """Find out before the first step that every stage has samples; all texts that a fresh LLM must know words of."""
    from trainer.data.batches import select
    from trainer.model.llm import FRESH_PREFIX
    from trainer.model.video_llm import texts_of

    texts: list[str] = []
    for stage in stages:
        samples, source = open_tokens(stage.config, None)
        try:
            data = select(samples, source, stage.config)
        except UserError as error:
            raise UserError(f"stage {stage.name} of this recipe: {error}") from error
        texts += texts_of(stage.config, data.samples) if stage.config.llm.startswith(FRESH_PREFIX) else ()
    return texts


def _with_start(stages: Stages, stage: Stage, out: Path) -> TrainConfig:
    """A stage's settings with the run before it as its start."""
    index, folder = stages.index(stage), out / stage.name
    if index == 0 or stage.config.init is not None:
        return stage.config
    # A stage that has begun keeps the path it began with: the chain's folder may have another name by now.
    has_begun = (folder / CONFIG_FILE).exists()
    init = read_config(folder).init if has_begun else str(out / stages[index - 1].name)
    return replace(stage.config, init=init)


def _finished(folder: Path, config: TrainConfig) -> TrainResult | None:
    """The result of a run that is at its end, so that nothing is loaded for it; None if there is more to train."""
    from trainer.loop.train import TrainResult
    from trainer.runs.checkpoint import best, resolve_start
    from trainer.runs.run_record import RunRecord, read_metrics

    checkpoint = resolve_start(folder, config, resume=True)
    if checkpoint is None:
        return None
    record, step = RunRecord.read(folder), int(checkpoint.name.removeprefix("step-"))
    if step < record.num_steps:
        return None
    return TrainResult(
        run=str(folder),
        steps=step,
        num_steps=record.num_steps,
        loss=read_metrics(folder)[-1]["loss"],
        data_digest=record.data_digest,
        checkpoint=str(checkpoint),
        best=str(best(folder) or ""),
    )
