"""Command line `merv-train`: parse options, call one library function, print the result.

torch and transformers are imported inside the commands (`load_torch_modules`), so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from featurestore.locate import FEATURES, ROOT_METADATA, Place, find_store, is_url, names_of, no_store_at
from mervcache.completion import complete_dataset, complete_encoders, complete_store
from mervcache.config import load_yaml
from mervcache.console import CONTEXT, handle_errors, print_result, stacked
from mervcache.errors import StoreNotFoundError, UserError
from mervcache.program import ProgramCommand
from trainer.cli_examples import EXAMPLES
from trainer.cli_launch import launch_options, pop_processes, sbatch_script
from trainer.cli_sizes import size_options
from trainer.config import (
    FUSIONS,
    HEADS,
    PROJECTORS,
    RECORD_FILE,
    LiveRequest,
    Mode,
    Quantisation,
    Tracker,
    TrainLLM,
)
from trainer.loop.launch import end_with_failures, is_first_rank, is_launched
from trainer.loop.stages import dry_run_stages, merge_settings, to_yaml, train_in_stages
from trainer.recipes import FULL_RECIPE, MODE_FULL, RECIPES, Stages, get_stages
from trainer.render import print_dry_run, result_lines
from trainer.runs.stage_folders import check_is_free, read_record_file, read_stages, stage_folder

handle_cli_errors = handle_errors(
    interrupted="Interrupted. What was written is kept; merv-train goes on with --resume auto."
)


def load_torch_modules() -> None:
    """Set what torch reads when it is loaded; commands import what needs them after this call.

    OpenMP threads that spin while they wait take cores from each other: on two loaded cores, training the demo fell
    from 185 to 20 samples/s, and to 115 with passive waiting. The variable is read once, when torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


ONLY_STORE = "-"  # --from-cache without a path: the only store under features/

LIVE_OPTIONS = ("dataset", "root", "weights", "extract_config", "skip_media_check", "end_to_end")  # no settings
live_options = stacked(  # of --end-to-end, named as in `merv-pipeline extract`
    click.option("--end-to-end", is_flag=True, help="Decode and encode while training, instead of --from-cache."),
    click.option(
        "--dataset",
        shell_complete=complete_dataset,
        help="End to end: dataset by name; `merv-pipeline datasets` lists them.",
    ),
    click.option("--root", type=click.Path(file_okay=False), help="End to end: folder of media and annotations."),
    click.option(
        "--encoders",
        metavar="LIST",
        shell_complete=complete_encoders,
        help="Encoders of the run, comma separated; the order matters.",
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
        "--skip-media-check", is_flag=True, help="End to end: do not decode every clip once before the first step."
    ),
)


@click.command(cls=ProgramCommand, context_settings=CONTEXT, epilog=EXAMPLES["train"])
@handle_cli_errors
@click.version_option(package_name="merv-pipeline")
@click.option(
    "--from-cache",
    "store",
    shell_complete=complete_store,
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
@click.option("--head", type=click.Choice(list(HEADS)), help="Trained head after the resampler.")
@click.option("--fusion", type=click.Choice(list(FUSIONS)), help="How the encoders' tokens are fused.")
@click.option("--train-llm", type=click.Choice(get_args(TrainLLM)), help="How much of the LLM is trained.")
@click.option(
    "--llm-quant",
    type=click.Choice(get_args(Quantisation)),
    help="Quantise the untrained weights of the LLM. Not tested on a GPU; needs CUDA and the extra `quant`.",
)
@click.option(
    "--stage",
    help="Train on the samples of this stage, align or finetune; of a recipe with two stages, run only this one.",
)
@size_options
@click.option("--init", metavar="RUN", help="Start from the weights of this run or export, and with its encoders.")
@click.option(
    "--init-partial", is_flag=True, default=None, help="Load only the parts of --init that fit and report the others."
)
@click.option("--eval-every", type=click.IntRange(min=1), help="Steps between validations on held-out samples.")
@click.option(
    "--track", "trackers", multiple=True, type=click.Choice(get_args(Tracker)), help="Log to this too. Repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/merv"), help="Folder of the run.")
@click.option(
    "--resume",
    metavar="auto|RUN",
    help="auto: resume --out if it has a checkpoint, else start; RUN: resume that run.",
)
@launch_options
@click.option(
    "--device-memory",
    metavar="SIZE",
    show_default="what the GPU has",
    help="Fit every process into this, such as 80GB: checkpointing and smaller micro-batches, or an error.",
)
@click.option("--dry-run", is_flag=True, help="Print parameters, memory, steps and what is dropped; train nothing.")
@click.option("--print-config", is_flag=True, help="Print every setting in force as YAML for --config; do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train_main(
    store: str | None,
    config_file: Path | None,
    out: Path,
    resume: str | None,
    dry_run: bool,
    print_config: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train projectors and fusion, and the LLM on request, from the tokens of a feature store or end to end."""
    if options.pop("print_sbatch"):
        click.echo(sbatch_script(options["launch"], sys.argv[1:]), nl=False)
        return
    processes = pop_processes(options)
    start, out, earlier = resolve_run(resume, out, options)
    live = pop_live_options(options)  # the rest are settings
    only = options.pop("stage") if len(start) > 1 else None
    stages = resolve_stages(start, config_file, options)
    if print_config:
        click.echo(to_yaml(stages), nl=False)
        return
    place = resolve_source(store, live, earlier)
    if dry_run:
        load_torch_modules()
        launched = {} if processes is None else {"launch": processes.launch, "processes": processes.total}
        report = dry_run_stages(stages, place, **launched)
        print_result(report, as_json, lambda: print_dry_run(report))
        return
    if not is_launched():  # one of several ranks may find what the first has begun
        if resume is None:
            check_is_free(out, stages, only)
        if processes is not None:
            processes.start(sys.argv[1:])
    load_torch_modules()
    results = train_in_stages(stages, place, out, resume=resume is not None, only=only)
    if is_first_rank():
        result = {**results[-1], "stages": results} if len(stages) > 1 else results[-1]
        print_result(result, as_json, lambda: click.echo("\n".join(result_lines(results))))
    if any(result["skipped"] or result["unranked"] for result in results):
        end_with_failures()


def resolve_run(resume: str | None, out: Path, options: dict[str, Any]) -> tuple[Stages, Path, dict[str, Any] | None]:
    """Settings to start from, the folder of the run, and the record of the run that is resumed if one is named."""
    recipe = resolve_recipe(options.pop("recipe"), options)
    if resume in (None, "auto"):
        return recipe, out, None
    return read_stages(Path(resume)), Path(resume), earlier_record(Path(resume))


def resolve_recipe(name: str, options: dict[str, Any]) -> Stages:
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
    return merge_settings(stages, settings, given)


def earlier_record(run: Path) -> dict[str, Any] | None:
    """The record of a run, or of the first stage of a staged run; None if nothing has begun."""
    stages = read_stages(run)
    folder = stage_folder(run, stages, stages[0])
    has_begun = (folder / RECORD_FILE).is_file() or any(folder.glob("checkpoints/step-*"))
    return read_record_file(folder) if has_begun else None


def _change(changes: dict[str, Any], part: str, **values: Any) -> None:
    changes[part] = {**changes.get(part, {}), **values}


def resolve_source(
    store: str | None, options: Mapping[str, Any], earlier: Mapping[str, Any] | None = None
) -> str | LiveRequest:
    """A store's path, or the extraction to run live: from the options, else from the record of the resumed run."""
    live = {name: options[name] for name in ("dataset", "root", "weights")}
    file, is_trusted, is_live = options["extract_config"], options["skip_media_check"], options["end_to_end"]
    if is_live and store is not None:
        raise UserError("tokens come from a store or are computed live: give --from-cache or --end-to-end, not both")
    if store is None and earlier is not None and not is_live:
        store, is_live = earlier["store"] or None, earlier.get("live") is not None
    if is_live:
        recorded = dict((earlier or {}).get("live") or {})
        is_trusted = recorded.pop("trust_media", False) or is_trusted
        given = {name: value for name, value in live.items() if value not in (None, ())}
        return LiveRequest(settings={**recorded, **given}, config_file=file, is_trusted=is_trusted)
    idle = {**live, "extract_config": file, "skip_media_check": is_trusted}
    if given := [f"--{name.replace('_', '-')}" for name, value in idle.items() if value]:
        raise UserError(f"{', '.join(given)} are for live encoding: give --end-to-end too")
    if store is None:
        raise UserError(
            f"no source of tokens: give --from-cache STORE, --from-cache alone for the only store under {FEATURES}/,"
            " or --end-to-end --dataset NAME to decode and encode while training"
        )
    return str(_existing(find_store(None if store == ONLY_STORE else store)))


def pop_live_options(options: dict[str, Any]) -> dict[str, Any]:
    """Remove and return the options of `live_options` that are no settings; `--encoders` is one, split into names."""
    if isinstance(options.get("encoders"), str):
        options["encoders"] = names_of(options["encoders"])
    return {name: options.pop(name) for name in LIVE_OPTIONS if name in options}


def _existing(store: Place) -> Place:
    """Refuse a folder without a store before torch is loaded, which takes seconds. A URL is checked later."""
    if not is_url(store) and not (Path(store) / ROOT_METADATA).is_file():
        raise StoreNotFoundError(no_store_at(store))
    return store


if __name__ == "__main__":
    train_main(prog_name="merv-train")  # as launched processes are started
