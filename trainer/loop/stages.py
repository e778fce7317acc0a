"""Recipes of several stages: settings merged over a recipe, and each stage trained from the weights of the one before.

What was trained already is read from the folders (`trainer/runs/stage_folders.py`), so a chain is resumed by the same
call. torch is imported inside functions, because the command line imports this module for `--help`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from featurestore.locate import check_room
from featurestore.transfer.selection import read_clip_list
from mervcache.config import overlay
from mervcache.errors import UserError, unknown_name
from trainer.config import CONFIG_FILE, TrainConfig, read_config
from trainer.loop.launch import Launch, is_first_rank
from trainer.loop.sizes import as_begun
from trainer.recipes import Stages
from trainer.runs.lock import STAGES_LOCK, run_lock
from trainer.runs.stage_folders import STAGES_FILE, check_is_free, settings_by_stage, stage_folder, write_stages

if TYPE_CHECKING:
    from trainer.loop.train import TrainResult
    from trainer.model.llm import LoadedLLM
    from trainer.sources import OpenTokens, TokenPlace

STAGES_KEY = "stages"  # of a config file: holds the settings of single stages


def merge_settings(stages: Stages, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Stages:
    """A recipe, then a file's settings, then those the file has for one stage, then options: later ones win.

    Of settings for a whole chain, `init` is where its first stage starts, and `prompt` leaves a caption stage as it
    is. The file of clip ids that `exclude` may name is read here. All layers are merged before they are checked: a file
    may name a frozen LLM that is valid only with an option such as `--train-llm full`.
    """
    by_stage = settings.get(STAGES_KEY) or {}
    if not isinstance(by_stage, Mapping) or not all(isinstance(value, Mapping) for value in by_stage.values()):
        raise UserError(f"setting {STAGES_KEY} is a mapping of stage names to settings, got {by_stage!r}")
    names = [stage.name for stage in stages]
    if unknown := [name for name in by_stage if name not in names]:
        raise UserError(unknown_name(f"stage in {STAGES_KEY}", unknown[0], names))
    common = {name: value for name, value in settings.items() if name != STAGES_KEY}
    if len(stages) > 1 and "stage" in common:
        raise UserError(
            f"this recipe has its own stages, {', '.join(names)}: set `stage` under `{STAGES_KEY}: {{NAME: ...}}`"
        )
    merged = []
    for index, stage in enumerate(stages):
        fixed: set[str] = set()  # settings that are not changed for the whole chain
        if len(stages) > 1:
            fixed = {"stage", *(["init"] if index else []), *(["prompt"] if stage.config.prompt == "caption" else [])}
        layers = [_without(common, fixed), by_stage.get(stage.name, {}), _without(options, fixed)]
        layers = [_with_clip_list(layer) for layer in layers]
        config = overlay(stage.config, _merge(layers))
        merged.append(replace(stage, config=replace(config, by_samples=_not_given(stage.config.by_samples, layers))))
    return tuple(merged)


def to_yaml(stages: Stages) -> str:
    """A config file that gives these settings over any recipe of the same stages."""
    if len(stages) == 1:
        return stages[0].config.to_yaml()
    return yaml.safe_dump({STAGES_KEY: settings_by_stage(stages)}, sort_keys=False)


def train_in_stages(
    stages: Stages, place: TokenPlace | Path, out: Path | str, *, resume: bool = False, only: str | None = None
) -> list[dict[str, Any]]:
    """Train a recipe's stages in turn.

    Parameters
    ----------
    stages
        Stages and their settings, such as `get_stages("demo")`.
    place
        Where tokens come from: a store's path or URL, or a `LiveRequest` to encode while training.
    out
        Folder of the run; with several stages each has a folder in it.
    resume
        Continue from the newest checkpoint; finished stages are skipped.
    only
        Name of the one stage to train.

    Returns
    -------
    list of dict
        A `TrainResult` of each stage: run, steps, loss, checkpoint, skipped, ...

    Raises
    ------
    UserError
        Settings, samples and store do not fit, or the folder holds another run.
    RunStoppedError
        Memory or disk ran out; `resume` continues.
    """
    from trainer.sources import opened, store_of

    out, place = Path(out), str(place) if isinstance(place, Path) else place
    with opened(place, out) as open_tokens:
        results = train_stages(stages, open_tokens, out, store=store_of(place), resume=resume, only=only)
    return [asdict(result) for result in results]


def dry_run_stages(
    stages: Stages, place: TokenPlace, *, launch: Launch | None = None, processes: int | None = None
) -> dict[str, Any]:
    """Everything that is known before the first step of every stage, with the tokens of a place.

    It is that of one process, of so many that `launch` would start.
    """
    from trainer.sources import opened, store_of

    with opened(place) as open_tokens:
        return describe_stages(stages, open_tokens, store=store_of(place), launch=launch, processes=processes)


def train_stages(
    stages: Stages,
    open_tokens: OpenTokens,
    out: Path,
    *,
    store: str = "",
    resume: bool = False,
    only: str | None = None,
    llm: LoadedLLM | None = None,
    quiet: bool = False,
) -> list[TrainResult]:
    """Train the stages in turn, or the one named `only`; a stage that stops before its end is the last one.

    `open_tokens` gives the samples and the token source of a stage's settings. With `resume` finished stages are
    skipped, and an unfinished one goes on from its newest checkpoint. `llm` is an LLM that is loaded already, for
    stages that do not train it.
    """
    from trainer.loop.train import train
    from trainer.runs.checkpoint import newest

    out = Path(out)
    names = [stage.name for stage in stages]
    if only is not None and only not in names:
        raise UserError(unknown_name("stage of this recipe", only, names))
    with contextlib.ExitStack() as held:
        if is_first_rank():
            check_room(out, "run", "--out")
            held.enter_context(run_lock(out, STAGES_LOCK))
        _prepare_folder(out, stages, only, resume)
        is_new = newest(stage_folder(out, stages, stages[0])) is None  # a stage without checkpoint starts over
        words = _check_samples(stages, open_tokens) if len(stages) > 1 and is_new else ()
        results: list[TrainResult] = []
        for index, stage in enumerate(stages):
            if only not in (None, stage.name):
                continue
            config, folder = stage.config, stage_folder(out, stages, stage)
            if index and config.init is None:
                # A stage that has begun keeps the path it began with: the chain's folder may have been renamed since.
                has_begun = (folder / CONFIG_FILE).exists()
                init = read_config(folder).init if has_begun else str(out / stages[index - 1].name)
                config = replace(config, init=init)
            result = _finished_result(folder, config) if resume else None
            if result is None:
                samples, source = open_tokens(config, folder)
                result = train(
                    config, samples, source, folder, store=store, resume=resume, words=words, llm=llm, quiet=quiet
                )
                # accelerate ties a model to itself: its memory and its optimizer's are taken until it is collected.
                gc.collect()
            results.append(result)
            if result.steps < result.num_steps:
                break
    return results


def describe_stages(
    stages: Stages,
    open_tokens: OpenTokens,
    *,
    store: str = "",
    launch: Launch | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """The report of a dry run, of each stage where there are several; a later stage's start is not trained yet."""
    from trainer.loop.memory import planned_device
    from trainer.loop.plan import describe, make_plan

    words = _check_samples(stages, open_tokens) if len(stages) > 1 else ()
    reports = {}
    for index, stage in enumerate(stages):
        samples, source = open_tokens(stage.config, None)
        device = planned_device(stage.config, launch, processes)
        plan = make_plan(stage.config, samples, source, store=store, words=words, device=device)
        reports[stage.name] = describe(plan)
        if index and stage.config.init is None:
            reports[stage.name]["init"] = f"all weights of stage {stages[index - 1].name}"
    return {STAGES_KEY: reports} if len(stages) > 1 else next(iter(reports.values()))


def _with_clip_list(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings with the clip ids of the file that `exclude` names: a run records them and not its path."""
    path = settings.get("exclude")
    if not isinstance(path, str):
        return settings
    try:
        clip_ids = read_clip_list(path, may_be_empty=True)
    except UserError as error:
        raise UserError(
            f"exclude: {error}; a run that has begun has its list and goes on with merv-train --resume RUN"
        ) from error
    return {**settings, "exclude": sorted(clip_ids)}


def _without(settings: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _merge(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Later layers win; mappings are merged entry by entry."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            before = merged.get(name)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                value = _merge([before, value])
            merged[name] = value
    return merged


def _not_given(by_samples: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
    """`by_samples` without the settings that a layer has; one that has `by_samples` itself, as a printed config does,
    decides for itself."""
    for layer in layers:
        given = {*layer, *(f"optimizer.{name}" for name in layer.get("optimizer") or {})}
        rest = {name: value for name, value in by_samples.items() if name not in given}
        by_samples = overlay(TrainConfig(), {"by_samples": layer.get("by_samples", rest)}).by_samples
    return by_samples


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
    write_stages(out, stages)


def _check_samples(stages: Stages, open_tokens: OpenTokens) -> list[str]:
    """Check before the first step that every stage has samples; returns all texts a fresh LLM must know words of."""
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


def _finished_result(folder: Path, config: TrainConfig) -> TrainResult | None:
    """The result of a run that is at its end, so that nothing is loaded for it; None if there is more to train."""
    from trainer.loop.train import TrainResult
    from trainer.runs.checkpoint import checkpoint_to_resume, load_state
    from trainer.runs.disk import remove_leftovers
    from trainer.runs.run_record import RunRecord

    checkpoint = checkpoint_to_resume(folder, as_begun(config, folder), resume=True)
    if checkpoint is None:
        return None
    record, step = RunRecord.read(folder), int(checkpoint.name.removeprefix("step-"))
    if step < record.num_steps:
        return None
    load_state(checkpoint)  # not read here, but it is what the result names
    if is_first_rank():
        with run_lock(folder):
            remove_leftovers(folder)
    return TrainResult.of_run(
        folder,
        steps=step,
        num_steps=record.num_steps,
        data_digest=record.data_digest,
        num_questions=record.num_questions,
    )
