"""Command lines of training and evaluation: `merv-train` and `merv-eval`.

Thin: parse, call one function of the house, print. Results go to stdout (`--json` for programs), progress to stderr,
and an error that a person can act on is its message without a traceback. torch is imported inside the commands, so
that `--help` answers at once.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import click

from featurestore.errors import MervCacheError, UserError
from trainer.config import (
    PROJECTORS,
    RECORD_FILE,
    FusionName,
    Mode,
    TrainConfig,
    TrainLLM,
    load_yaml,
    overlay,
    read_config,
)
from trainer.recipes import RECIPES, get_recipe

ONLY_STORE = "-"  # --from-cache without a path: the only store under features/
FEATURES = Path("features")


def _says_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print the message of our own errors and leave with code 1; everything else is a bug and keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except MervCacheError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


@click.command(context_settings={"show_default": True})
@click.option(
    "--from-cache",
    "store",
    is_flag=False,
    flag_value=ONLY_STORE,
    metavar="[STORE]",
    help=f"Read tokens from this store; without a path, from the only one under {FEATURES}/.",
)
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="merv-frozen", help="Settings to start from.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML of settings that differ from the recipe's; unknown ones are errors.",
)
@click.option("--llm", help="Hub id, local folder, or fresh:NAME.  [default: the recipe's]")
@click.option("--mode", type=click.Choice(get_args(Mode)), help="text-only drops the visual tokens: the baseline.")
@click.option("--projector", type=click.Choice(list(PROJECTORS)), help="Head between tokens and LLM.")
@click.option("--fusion", type=click.Choice(get_args(FusionName)), help="How the encoders' tokens are mixed.")
@click.option("--train-llm", type=click.Choice(get_args(TrainLLM)), help="How much of the LLM is trained.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/merv"), help="Folder of the run.")
@click.option(
    "--resume",
    metavar="auto|RUN",
    help="auto: go on with --out if it has a checkpoint, else start; RUN: go on with that run.",
)
@click.option("--dry-run", is_flag=True, help="Print parameters, steps, lengths and dropped samples; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_says_errors
def train_main(
    store: str | None,
    recipe: str,
    config_file: Path | None,
    out: Path,
    resume: str | None,
    dry_run: bool,
    as_json: bool,
    **options: str | None,
) -> None:
    """Train projectors and fusion, and the LLM if asked, from the tokens of a feature store."""
    start = get_recipe(recipe)
    if resume not in (None, "auto"):
        out = Path(resume)
        start, store = read_config(out), store or json.loads((out / RECORD_FILE).read_text())["store"]
    config = resolve_config(start, config_file, options)
    path = find_store(store)
    run = _heavy_rooms()
    if dry_run:
        click.echo(json.dumps(run.dry_run(config, path), indent=None if as_json else 1))
        return
    result = run.train_from_store(config, path, out, resume=resume is not None)
    words = f"{result['run']}: step {result['steps']} of {result['num_steps']}, loss {result['loss']:.4f}"
    click.echo(json.dumps(result) if as_json else words)


@click.group(context_settings={"show_default": True})
def eval_main() -> None:
    """Measure and use trained runs."""


@eval_main.command("run")
@click.option("--checkpoint", "checkpoint", type=click.Path(path_type=Path), required=True, help="Folder of a run.")
@click.option("--store", help="Store of the questions' clips.  [default: the one the run was trained on]")
@click.option("--split", default="heldout", help="Split whose questions are asked.")
@click.option(
    "--beside",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another run that answers the same questions, such as a text-only one; may be repeated.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Ask at most so many questions.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Questions at once, with all their options.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON, answers included.")
@_says_errors
def eval_run(checkpoint: Path, store: str | None, beside: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Multiple-choice accuracy by category, beside chance and beside other runs."""
    path = find_store(store) if store else None
    run = _heavy_rooms()
    result = run.evaluate_run(checkpoint, path, beside=beside, **options)
    if as_json:
        click.echo(json.dumps(result))
    else:
        run.print_scores(result)


def _heavy_rooms() -> ModuleType:
    """`trainer.run` with torch and transformers.

    OpenMP threads that spin while they wait take each other's cores away: on two cores beside other work, training the
    demo fell from 185 to 20 samples/s, and to 115 where they sleep. Read once, when torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from trainer import run

    return run


def resolve_config(config: TrainConfig, config_file: Path | None, options: dict[str, str | None]) -> TrainConfig:
    """A recipe, then the file, then the options, each over what came before."""
    changes = load_yaml(config_file) if config_file else {}
    given = {name: value for name, value in options.items() if value is not None}
    # One overlay: a file may name a frozen LLM that only --train-llm full makes sense of.
    changes |= {name: given[name] for name in ("llm", "mode", "train_llm") if name in given}
    if "fusion" in given:
        changes["fusion"] = {**changes.get("fusion", {}), "name": given["fusion"]}
    if "projector" in given:
        preset = PROJECTORS[given["projector"]]
        changes["projector"] = {
            **changes.get("projector", {}),
            "head": preset.head,
            "pre_layer_norm": preset.pre_layer_norm,
        }
    return overlay(config, changes)


def find_store(store: str | None) -> str:
    """The store asked for, or the only one under features/."""
    if store is None:
        raise UserError(f"where are the tokens? Give --from-cache STORE, or --from-cache alone for {FEATURES}/*.zarr")
    if store != ONLY_STORE:
        return store
    found = sorted(str(path) for path in FEATURES.glob("*.zarr"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"no store under {FEATURES.resolve()}: make one with merv-pipeline extract, or give its path")
    raise UserError(f"{len(found)} stores under {FEATURES}/: {', '.join(found)}; give one with --from-cache STORE")
