"""The command `merv-train sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click
import yaml
from click.core import ParameterSource

from featurestore.locate import FEATURES, names_of
from jobs.settings import AUTO_WORKERS, ClusterRequest, ClusterSettings
from mervcache.completion import complete_encoders, complete_store
from mervcache.config import load_yaml, overlay, parse_pairs, to_builtin
from mervcache.console import CONTEXT, examples, format_bytes, print_result
from mervcache.errors import EXIT_WITH_FAILURES, UserError
from trainer import cli
from trainer.ablation.sweep import (
    RETRAINED,
    SECTION,
    SUBSET_RULES,
    SWEEP_FILE,
    SweepConfig,
    read_sweep,
    recorded_axes,
    resume_command,
)
from trainer.loop.launch import Launch
from trainer.loop.stages import merge_settings, to_yaml
from trainer.recipes import Stages, get_stages
from trainer.runs.stage_folders import check_are_runs

if TYPE_CHECKING:
    from trainer.ablation.execute import PinnedSweep, RunOutcome
    from trainer.ablation.forecast import Forecast
    from trainer.ablation.rates import RateResult

LISTS = {  # axes that are lists -> the type of an entry
    "encoders": str,
    "subsets": str,
    "fusions": str,
    "projectors": str,
    "grids": int,
    "nested_grids": int,
    "rates": float,
    "seeds": int,
}
AXES = (*LISTS, "text_only", "one_shot", "post_hoc", "split")
SETTINGS = (
    "recipe",
    "config_file",
    "llm",
    "head",
    "train_llm",
    "llm_quant",
    "fraction",
    "limit",
    "exclude",
    "trackers",
)


@click.command(
    "sweep",
    context_settings=CONTEXT,
    epilog=examples(
        "merv-train sweep --from-cache features/lab.zarr --recipe demo --seeds 0,1,2 --out runs/sweep --dry-run",
        "merv-train sweep --out runs/sweep",
    ),
    params=[option for option in cli.train_main.params if option.name in SETTINGS],  # as in merv-train
)
@cli.handle_cli_errors
@click.option(
    "--from-cache",
    "store",
    shell_complete=complete_store,
    is_flag=False,
    flag_value=cli.ONLY_STORE,
    metavar="[STORE]",
    help=f"Store of the tokens; without a path, the only one under {FEATURES}/.",
)
@click.option(
    "--encoders",
    metavar="LIST",
    shell_complete=complete_encoders,
    show_default="all of the store",
    help="Encoders of the whole sweep.",
)
@click.option(
    "--subsets",
    metavar="|".join([*SUBSET_RULES, "LIST"]),
    show_default="all",
    help="Subsets to train: rules, or encoders joined by + (dinov2+siglip,vivit).",
)
@click.option("--fusions", metavar="LIST", show_default="the recipe's", help="Fusions, comma separated.")
@click.option("--projectors", metavar="LIST", show_default="the recipe's", help="Projectors, comma separated.")
@click.option("--grids", metavar="LIST", show_default="the recipe's", help="Tokens per frame: 1,4,16,64.")
@click.option(
    "--nested-grids",
    metavar="LIST",
    help="Also train all encoders at a random one of these grids per step; score each.",
)
@click.option("--rates", metavar="LIST", show_default="1", help="Factors of all learning rates: 0.5,1,2.")
@click.option("--seeds", metavar="LIST", show_default="0", help="Seeds, comma separated.")
@click.option("--text-only/--no-text-only", default=None, show_default="yes", help="Also the run without encoders.")
@click.option(
    "--one-shot", is_flag=True, default=None, help="Also train all encoders under random masks; score every subset."
)
@click.option("--post-hoc", is_flag=True, default=None, help="Also score every subset of runs of all encoders.")
@click.option("--split", show_default="heldout", help="Split whose questions score the runs.")
@click.option("--max-steps", type=click.IntRange(min=1), show_default="the recipe's", help="Steps of every run.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/sweep"), help="Folder of the sweep.")
@click.option(
    "--scheduler",
    metavar="local|cuda|slurm|ADDRESS",
    help="Train side by side on the workers of this cluster, as in `merv-pipeline extract`; else one after another.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="With --scheduler: runs at once.  [default: one per GPU, or per --processes GPUs]",
)
@click.option(
    "--cluster", metavar="KEY=VALUE", multiple=True, help="A setting of the cluster, as in extract. Repeatable."
)
@click.option(
    "--launch",
    type=click.Choice(get_args(Launch)),
    help="With --scheduler: every run in several processes, on the GPUs of one node; with slurm in a job of its own.",
)
@click.option("--processes", type=click.IntRange(min=1), help="With --launch: processes of each run.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print runs, memory, hours (from a few measured steps) and break-even of the store; write nothing.",
)
@click.option(
    "--live",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="An end-to-end run whose steps give the cost of live encoding; default: the store's journal.",
)
@click.option(
    "--check-rates",
    metavar="LIST",
    help="Instead of the sweep, train the first subset of each size with these factors of the learning rates: 0.5,1,2.",
)
@click.option(
    "--check-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.2,
    show_default=True,
    help="With --check-rates: share of the steps to run.",
)
@click.option("--print-config", is_flag=True, help="Print the axes and every setting as YAML for --config; do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def sweep(
    context: click.Context,
    store: str | None,
    recipe: str,
    config_file: Path | None,
    out: Path,
    scheduler: str | None,
    workers: int | None,
    cluster: tuple[str, ...],
    launch: Launch | None,
    processes: int | None,
    dry_run: bool,
    live: Path | None,
    check_rates: str | None,
    check_share: float,
    print_config: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train and score every combination of encoders, fusions, projectors, grids and seeds from one store.

    Repeat it with --out alone to resume and to retry failed runs, or with other axes to add combinations.
    Exit code 3: some runs failed.
    """
    typed = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    is_recorded = not {*AXES, *SETTINGS, "max_steps"}.intersection(typed) and (out / SWEEP_FILE).exists()
    planned = recorded_axes(read_sweep(out)) if is_recorded else [resolve_sweep(recipe, config_file, options)]
    if print_config:
        click.echo("---\n".join(to_sweep_yaml(*axes) for axes in planned), nl=False)
        return
    factors = [_number(float, "check-rates", text) for text in names_of(check_rates)] if check_rates else []
    if live is not None:
        check_are_runs(live)
    request = resolve_cluster(scheduler, workers, cluster, launch, processes)
    place = None
    if store is not None or not is_recorded:
        place = cast("str", cli.resolve_source(store, dict.fromkeys(cli.LIVE_OPTIONS)))  # no live option is given
    cli.load_torch_modules()
    from trainer.ablation.execute import open_recorded, open_sweep, run_sweep, run_sweep_on, write_times
    from trainer.ablation.wall_time import read_times

    pinned = open_recorded(out, place) if is_recorded else open_sweep(*planned[0], place or "", out)
    if dry_run:
        from trainer.ablation.forecast import forecast

        found = forecast(pinned, live=live)
        record = {"sweep": str(out), **pinned.pins, "runs": {run.name: run.to_record() for run in pinned.runs}}
        print_result({**record, "forecast": found.to_dict()}, as_json, lambda: print_runs(pinned, found))
        return
    if factors:
        from trainer.ablation.rates import best_by_size
        from trainer.ablation.rates import check_rates as check

        checked = check(pinned, factors, share=check_share)
        result = {"sweep": str(out), "rates": [asdict(one) for one in checked], "best": best_by_size(checked)}
        print_result(result, as_json, lambda: print_rates(checked, best_by_size(checked), factors))
        return
    if request is None:
        outcomes = run_sweep(pinned)
    else:
        outcomes = run_sweep_on(pinned, request, launch=launch_options(launch, processes))
    write_times(pinned, live)
    times = read_times(out)
    result = {"sweep": str(out), "runs": [asdict(outcome) for outcome in outcomes], "times": times}
    print_result(result, as_json, lambda: print_outcomes(out, outcomes, times))
    if any(outcome.status == "failed" for outcome in outcomes):
        context.exit(EXIT_WITH_FAILURES)


def resolve_sweep(recipe: str, config_file: Path | None, options: dict[str, Any]) -> tuple[SweepConfig, Stages]:
    """The axes and the settings of every run: a recipe, then the file, then the options."""
    settings = load_yaml(config_file) if config_file else {}
    given = {name: value for name, value in options.items() if value not in (None, ())}
    axes = {name: given.pop(name) for name in list(given) if name in AXES}
    for name in LISTS:
        if name in axes:
            axes[name] = [_number(LISTS[name], name, text) for text in names_of(axes[name])]
    if "head" in given:
        given["projector"] = {"head": given.pop("head")}
    in_file = settings.pop(SECTION, None) or {}
    stages = merge_settings(get_stages(recipe), settings, given)
    return overlay(overlay(SweepConfig(), in_file, where=f"{SECTION}."), axes), stages


def resolve_cluster(
    scheduler: str | None, workers: int | None, cluster: tuple[str, ...], launch: Launch | None, processes: int | None
) -> ClusterRequest | None:
    """The cluster that the options ask for; None: this process."""
    if scheduler is None:
        if workers or cluster or launch or processes:
            raise UserError(
                "--workers, --cluster, --launch and --processes are for runs side by side: give --scheduler"
            )
        return None
    if processes and launch is None:
        raise UserError("--processes is of --launch: give --launch ddp or fsdp too")
    settings = ClusterSettings.from_mapping(parse_pairs("--cluster", cluster))
    ranks = 1
    if launch is not None:
        from jobs.clusters import visible_gpus  # here, for --help

        listed = settings.devices.split(",") if settings.devices else visible_gpus()
        ranks = processes or {"slurm": settings.gpus, "cuda": len(listed)}.get(scheduler, 1)
        if not ranks and scheduler == "slurm":
            raise UserError("--cluster gpus=0 leaves the number of processes open: give --processes too")
    return ClusterRequest(
        scheduler=scheduler, num_workers=workers or AUTO_WORKERS, ranks=max(1, ranks), settings=settings
    )


def launch_options(launch: Launch | None, processes: int | None) -> list[str]:
    """Options of `merv-train` for the processes of every run."""
    options = [] if launch is None else ["--launch", launch]
    return [*options, *([] if processes is None else ["--processes", str(processes)])]


def to_sweep_yaml(axes: SweepConfig, stages: Stages) -> str:
    """A config file that gives these axes and settings."""
    return yaml.safe_dump({SECTION: to_builtin(asdict(axes))}, sort_keys=False) + to_yaml(stages)


def _number(kind: type, name: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{name.replace('_', '-')} takes numbers separated by commas, got {text!r}") from None


def print_runs(sweep: PinnedSweep, found: Forecast) -> None:
    """Print the runs of a dry run, what pins them, and what they will take."""
    from mervcache.console import console, table  # rich

    rows = []
    for run in sweep.runs:
        grid = "stored" if run.tokens_per_frame is None else run.tokens_per_frame
        grid = ",".join(map(str, run.nested_grids)) or grid
        axes = (run.fusion, run.projector, grid) if run.encoders else ("-", "-", "-")
        note = "frozen LLM: scored as it is"
        if run.is_trained:
            note = "" if run.method == RETRAINED else run.method
        rows.append(("+".join(run.encoders) or "text only", *axes, f"{run.rate:g}", run.seed, note))
    columns = ("encoders", "fusion", "projector", "tokens/frame", "rate", "seed", "")
    table(columns, rows, right=("tokens/frame", "rate", "seed"))
    console().print(
        f"{len(sweep.runs):,} runs of {len(sweep.samples):,} samples, scored on {len(sweep.questions):,} questions:"
        f" clips with tokens of {', '.join(sweep.encoders)} in snapshot {sweep.pins['snapshot']}",
        markup=False,
    )
    rows = [
        (
            one.run,
            f"{one.steps:,}",
            f"{one.seconds / one.steps:.3g} s",
            "reading" if one.reads else "computing",
            format_bytes(one.memory_bytes["total"]),
        )
        for one in found.measured
    ]
    table(("measured", "steps", "a step", "limited by", "memory"), rows, right=("steps", "a step", "memory"))
    for line in found.describe():
        console().print(line, markup=False)


def print_rates(results: Sequence[RateResult], best: Mapping[int, float], factors: Sequence[float]) -> None:
    """Print the validation loss by size and factor, and which factor is best."""
    from mervcache.console import console, table  # rich

    by_place = {(result.encoders, result.factor): result for result in results}
    rows = []
    for encoders in dict.fromkeys(result.encoders for result in results):
        found = [by_place.get((encoders, factor)) for factor in factors]
        losses = [
            "-" if one is None else "not finite" if one.val_loss is None else f"{one.val_loss:.4f}" for one in found
        ]
        lowest = best.get(len(encoders))
        rows.append((str(len(encoders)), "+".join(encoders), *losses, "-" if lowest is None else f"{lowest:g}"))
    columns = [f"x {factor:g}" for factor in factors]
    table(("encoders", "subset", *columns, "lowest"), rows, right=("encoders", *columns, "lowest"))
    for result in results:
        if result.error:
            console().print(f"{result.run}: {result.error}", markup=False)
    console().print("validation loss on training clips that these runs left out", markup=False)
    edges = sorted(size for size, factor in best.items() if factor in (min(factors), max(factors)))
    if edges and len(factors) > 1:
        console().print(
            f"with {', '.join(map(str, edges))} encoders the lowest is at an end of the factors: try further ones",
            markup=False,
        )
    if len(set(best.values())) > 1:
        console().print(
            "sizes differ in their best factor: a sweep with one rate favours some of them; --rates"
            f" {','.join(f'{factor:g}' for factor in sorted(set(best.values())))} trains all of these",
            markup=False,
        )


def print_outcomes(out: Path, outcomes: Sequence[RunOutcome], times: Mapping[str, Any]) -> None:
    """Print a row per run, then what to do next."""
    from mervcache.console import console, table  # rich

    rows = [
        (
            outcome.name,
            outcome.status,
            "-" if outcome.accuracy is None else f"{outcome.accuracy:.3f}",
            "-" if outcome.questions is None else f"{outcome.questions:,}",
            outcome.error,
        )
        for outcome in outcomes
    ]
    has_errors = any(outcome.error for outcome in outcomes)
    columns = ("run", "status", "accuracy", "questions", *(["error"] if has_errors else []))
    table(columns, [row[: len(columns)] for row in rows], right=("accuracy", "questions"))
    if times["runs"]:
        from trainer.ablation.wall_time import describe

        console().print(describe(times), markup=False)
    finished = sum(outcome.status == "finished" for outcome in outcomes)
    if finished == len(outcomes):
        console().print(f"all {finished} runs are scored; next: merv-eval table {out}", markup=False)
    else:
        console().print(
            f"{finished} of {len(outcomes)} runs are scored; {resume_command(out)} goes on with the others",
            markup=False,
        )
