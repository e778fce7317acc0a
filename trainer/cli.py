"""Command line of training: `merv-train`.

Thin: parse, call one function of the house, print. Results go to stdout (`--json` for programs), progress to stderr,
and an error that a person can act on is its message without a traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from featurestore.locate import FEATURES, ROOT_METADATA, Place, find_store, is_url, names_of, no_store_at
from mervcache.console import CONTEXT, show_result, stacked
from mervcache.errors import StoreNotFoundError, UserError
from trainer.command import heavy_rooms, says_errors
from trainer.config import (
    PROJECTORS,
    RECORD_FILE,
    FusionName,
    HeadName,
    LiveRequest,
    Mode,
    Quantisation,
    Tracker,
    TrainLLM,
)
from trainer.loop.launch import Launch, is_first_rank, is_launched, relaunch
from trainer.loop.stages import lay_over, to_yaml
from trainer.overlay import load_yaml
from trainer.recipes import FULL_RECIPE, MODE_FULL, RECIPES, Stages, get_stages
from trainer.runs.chain import check_is_free, read_stages, stage_folder
from trainer.tell import print_plan, result_lines

ONLY_STORE = "-"  # --from-cache without a path: the only store under features/

live_options = stacked(  # what is encoded on the spot, in the words of `merv-pipeline extract`
    click.option("--end-to-end", is_flag=True, help="Decode and encode while training, instead of --from-cache."),
    click.option("--dataset", help="End to end: dataset by name; `merv-pipeline datasets` lists them."),
    click.option("--root", type=click.Path(file_okay=False), help="End to end: folder of media and annotations."),
    click.option(
        "--encoders", metavar="LIST", help="Encoders that the run uses, comma separated; their order matters."
    ),
    click.option(
        "--weights",
        metavar="SPEC",
        multiple=True,
        help="End to end: hub, a folder or random:SEED; or NAME=SPEC. Repeatable.",
    ),
    click.option(
        "--extract-config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="End to end: YAML of an extraction, as `merv-pipeline extract --print-config` prints it.",
    ),
    click.option(
        "--trust-media", is_flag=True, help="End to end: do not decode every clip once before the first step."
    ),
)


@click.command(context_settings=CONTEXT)
@says_errors
@click.option(
    "--from-cache",
    "store",
    is_flag=False,
    flag_value=ONLY_STORE,
    metavar="[STORE]",
    help=f"Read tokens from this store; without a path, from the only one under {FEATURES}/.",
)
@live_options
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="merv-frozen", help="Settings to start from.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML of settings that differ from the recipe's; unknown ones are errors.",
)
@click.option("--llm", show_default="the recipe's", help="Hub id, local folder, or fresh:NAME.")
@click.option(
    "--mode",
    type=click.Choice([*get_args(Mode), MODE_FULL]),
    help=f"{MODE_FULL} is the recipe {FULL_RECIPE}; text-only drops the visual tokens: the baseline.",
)
@click.option("--projector", type=click.Choice(list(PROJECTORS)), help="Resampler of each encoder's tokens.")
@click.option("--head", type=click.Choice(get_args(HeadName)), help="Trained head behind the resampler.")
@click.option("--fusion", type=click.Choice(get_args(FusionName)), help="How the encoders' tokens are mixed.")
@click.option("--train-llm", type=click.Choice(get_args(TrainLLM)), help="How much of the LLM is trained.")
@click.option(
    "--llm-quant",
    type=click.Choice(get_args(Quantisation)),
    help="Hold the untrained weights of the LLM so. Untested without a GPU: needs CUDA and the extra `quant`.",
)
@click.option("--stage", help="Train on the samples of this stage, align or finetune; of two stages, only this one.")
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), help="Train on this share of the samples.")
@click.option("--limit", type=click.IntRange(min=1), help="Train on at most so many samples.")
@click.option("--init", metavar="RUN", help="Start from the weights of this run or export.")
@click.option("--eval-every", type=click.IntRange(min=1), help="Validate on held-out samples every so many steps.")
@click.option(
    "--track", "trackers", multiple=True, type=click.Choice(get_args(Tracker)), help="Also log to. Repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/merv"), help="Folder of the run.")
@click.option(
    "--resume",
    metavar="auto|RUN",
    help="auto: go on with --out if it has a checkpoint, else start; RUN: go on with that run.",
)
@click.option(
    "--launch",
    type=click.Choice(get_args(Launch)),
    help="Train on several processes through accelerate: ddp, or fsdp for models too large for one GPU. After a SIGTERM"
    " they have 10 minutes to write a checkpoint.",
)
@click.option("--processes", type=click.IntRange(min=1), show_default="one per GPU", help="Of --launch.")
@click.option("--dry-run", is_flag=True, help="Print parameters, steps, lengths and dropped samples; train nothing.")
@click.option("--print-config", is_flag=True, help="Print every setting in force as YAML for --config; do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train_main(
    store: str | None,
    config_file: Path | None,
    out: Path,
    resume: str | None,
    launch: Launch | None,
    processes: int | None,
    dry_run: bool,
    print_config: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train projectors and fusion, and the LLM if asked, from the tokens of a feature store or end to end."""
    start, out, earlier = starting_point(resume, out, options)
    words = pop_live_words(options)  # what is left are settings
    only = options.pop("stage") if len(start) > 1 else None
    stages = resolve_stages(start, config_file, options)
    if print_config:
        click.echo(to_yaml(stages), nl=False)
        return
    place = asked_place(store, words, earlier)
    if dry_run:
        told = heavy_rooms().dry_run_stages(stages, place)
        show_result(told, as_json, lambda: print_plan(told))
        return
    if not is_launched():  # one of several ranks may find what the first has begun
        if resume is None:
            check_is_free(out, stages, only)
        if launch is not None:
            relaunch(launch, processes, sys.argv[1:])
    results = heavy_rooms().train_in_stages(stages, place, out, resume=resume is not None, only=only)
    if is_first_rank():
        told = {**results[-1], "stages": results} if len(stages) > 1 else results[-1]
        show_result(told, as_json, lambda: click.echo("\n".join(result_lines(results))))


def starting_point(
    resume: str | None, out: Path, options: dict[str, Any]
) -> tuple[Stages, Path, dict[str, Any] | None]:
    """Settings to start from, the folder of the run, and the record of the run that is resumed if one is named."""
    recipe = asked_recipe(options.pop("recipe"), options)
    if resume in (None, "auto"):
        return recipe, out, None
    return read_stages(Path(resume)), Path(resume), earlier_record(Path(resume))


def asked_recipe(name: str, options: dict[str, Any]) -> Stages:
    """The recipe of --recipe, or of --mode full."""
    if options["mode"] != MODE_FULL:
        return get_stages(name)
    options["mode"] = None
    is_default = click.get_current_context().get_parameter_source("recipe") is ParameterSource.DEFAULT
    if not is_default and name != FULL_RECIPE:
        raise UserError(f"--mode {MODE_FULL} is the recipe {FULL_RECIPE}; leave out --recipe {name}, or --mode")
    return get_stages(FULL_RECIPE)


def resolve_stages(stages: Stages, config_file: Path | None, options: Mapping[str, Any]) -> Stages:
    """A recipe, then the file, then the options, each over what came before."""
    settings = load_yaml(config_file) if config_file else {}
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "projector" in given:
        preset = PROJECTORS[given.pop("projector")]
        _change(given, "projector", resampler=preset.resampler, frame_divisor=preset.frame_divisor)
        if not preset.takes_grid and "grid" not in (settings.get("projector") or {}):
            _change(given, "projector", grid=None)  # the recipe's gives way
    if "head" in given:
        _change(given, "projector", head=given.pop("head"))
    if "fusion" in given:
        given["fusion"] = {"name": given["fusion"]}
    return lay_over(stages, settings, given)


def earlier_record(run: Path) -> dict[str, Any] | None:
    """What a run, or the first stage of a chain, says about its tokens; None if nothing has begun."""
    stages = read_stages(run)
    record = stage_folder(run, stages, stages[0]) / RECORD_FILE
    return json.loads(record.read_text()) if record.is_file() else None


def _change(changes: dict[str, Any], part: str, **values: Any) -> None:
    changes[part] = {**changes.get(part, {}), **values}


def asked_place(
    store: str | None, words: Mapping[str, Any], earlier: Mapping[str, Any] | None = None
) -> str | LiveRequest:
    """Where tokens come from, as asked or as the record of the run that is resumed says; `words` as they were given."""
    live = {name: words[name] for name in ("dataset", "root", "weights")}
    file, is_trusted, is_live = words["extract_config"], words["trust_media"], words["end_to_end"]
    if is_live and store is not None:
        raise UserError("tokens are read from a store or made on the spot: give --from-cache or --end-to-end, not both")
    if store is None and earlier is not None and not is_live:
        store, is_live = earlier["store"] or None, earlier.get("live") is not None
    if is_live:
        recorded = dict((earlier or {}).get("live") or {})
        is_trusted = recorded.pop("trust_media", False) or is_trusted
        given = {name: value for name, value in live.items() if value not in (None, ())}
        return LiveRequest(settings={**recorded, **given}, config_file=file, is_trusted=is_trusted)
    idle = {**live, "extract_config": file, "trust_media": is_trusted}
    if given := [f"--{name.replace('_', '-')}" for name, value in idle.items() if value]:
        raise UserError(f"{', '.join(given)} say what is encoded on the spot: give --end-to-end too")
    if store is None:
        raise UserError(
            f"where are the tokens? Give --from-cache STORE, --from-cache alone for the only store under {FEATURES}/,"
            " or --end-to-end --dataset NAME to decode and encode while training"
        )
    return str(_existing(find_store(None if store == ONLY_STORE else store)))


def pop_live_words(options: dict[str, Any]) -> dict[str, Any]:
    """Take out the options of `live_options` that are no settings; `--encoders` is one, and is cut into names."""
    if isinstance(options.get("encoders"), str):
        options["encoders"] = names_of(options["encoders"])
    names = ("dataset", "root", "weights", "extract_config", "trust_media", "end_to_end")
    return {name: options.pop(name) for name in names if name in options}


def _existing(store: Place) -> Place:
    """Refuse a folder without a store now: loading torch first would take seconds. A URL is looked at later."""
    if not is_url(store) and not (Path(store) / ROOT_METADATA).is_file():
        raise StoreNotFoundError(no_store_at(store))
    return store


if __name__ == "__main__":
    train_main(prog_name="merv-train")  # as launched processes are started
