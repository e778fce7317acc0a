"""The command `merv-eval probe`. Nothing here loads torch before the command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from featurestore.locate import names_of
from mervcache.completion import complete_store
from mervcache.console import CONTEXT, ProgressLine, echo, examples, format_bytes, handle_errors, print_result
from mervcache.errors import EXIT_WITH_FAILURES, UserError
from trainer.ablation.cli import SUFFIXES
from trainer.ablation.sweep import SUBSET_RULES
from trainer.cli import load_torch_modules

if TYPE_CHECKING:
    from trainer.ablation.document import Document, Section
    from trainer.ablation.probe import ProbeReport
    from trainer.ablation.probe_features import ProbeName
    from trainer.ablation.probe_sweep import Agreement

PROBES = ("linear", "attentive")  # as in trainer/ablation/probe_features.py, which loads torch


@click.command(
    "probe", context_settings=CONTEXT, epilog=examples("merv-eval probe features/lab.zarr --labels clips.csv")
)
@handle_errors(interrupted="Interrupted. Nothing was written.")
@click.argument("store", shell_complete=complete_store)
@click.option(
    "--labels", type=click.Path(dir_okay=False, path_type=Path), help="Table .csv or .parquet: clip_id, label."
)
@click.option(
    "--category",
    is_flag=False,
    flag_value="category",
    metavar="[COLUMN]",
    help="Instead: a column of the store's samples, category or source; clips whose samples differ in it are left out.",
)
@click.option(
    "--samples", default="", show_default="all", metavar="LIST", help="Sets of samples whose --category is read."
)
@click.option(
    "--encoders",
    default="",
    show_default="all",
    metavar="LIST",
    help="Encoders of the store: NAME, NAME@TxHxW or NAME@ID.",
)
@click.option(
    "--subsets", default="all", metavar="|".join([*SUBSET_RULES, "LIST"]), help="Sets of encoders, as for sweep."
)
@click.option("--probes", default=",".join(PROBES), metavar="LIST", help="Kinds of probes.")
@click.option(
    "--grids",
    default="",
    metavar="all|LIST",
    show_default="the mean for linear probes, the stored grid for attentive ones",
    help="Tokens per frame that probes read, such as 1,4,16; only averages that the store holds exactly.",
)
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    default=5,
    help="Folds of the cross-validation; each video is in one of them.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of folds, attentive probes and bootstrap.")
@click.option("--draws", type=click.IntRange(min=100), default=10_000, help="Bootstrap draws of the intervals.")
@click.option(
    "--max-memory", type=click.FloatRange(min=0, min_open=True), default=8.0, help="Gigabytes that may be used."
)
@click.option(
    "--sweep",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A sweep on STORE: compare the probes' ranking of encoder sets with that of its retrained runs.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", *SUFFIXES.values()]),
    show_default="that of --out, else text",
    help="Form.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with the prediction for every clip.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write instead of stdout.")
def probe_command(
    store: str,
    labels: Path | None,
    samples: str,
    encoders: str,
    subsets: str,
    probes: str,
    grids: str,
    max_memory: float,
    format_: str | None,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Rank encoders of STORE, sets of them, layers and grids, by small classifiers on labelled clips.

    Cross-validated; no LLM is trained. Exits with 3 if labelled clips or probes are left out.
    """
    form = format_ or (SUFFIXES.get(out.suffix) if out else "text")
    if form is None or (out is not None and form == "text"):
        raise UserError(f"--out {out}: give a name that ends in one of {', '.join(SUFFIXES)}, or --format")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    load_torch_modules()
    from mervcache.files import replace_text
    from trainer.ablation.probe import probe
    from trainer.ablation.render import FORMATS, print_document

    with ProgressLine("probe", unit="steps") as progress:
        report = probe(
            store,
            labels,
            samples=names_of(samples),
            encoders=names_of(encoders),
            subsets=names_of(subsets),
            probes=cast("list[ProbeName]", names_of(probes)),  # each is checked there
            grids=_grids(grids),
            max_memory=round(max_memory * 1e9),
            progress=progress,
            **options,
        )
    document = probe_document(report)
    if out is not None:
        replace_text(out, FORMATS[form][0](document))
        echo(f"wrote {out}")
    if as_json:
        print_result(report.to_dict(), True, lambda: None)
    elif out is None:
        print_document(document, form)
    for what, count in report.left_out.items():
        echo(f"left out: {count:,} {what}")
    for what, reason in report.not_computed.items():
        echo(f"not computed: {what}: {reason}")
    if report.left_out or report.not_computed:
        sys.exit(EXIT_WITH_FAILURES)


def _grids(text: str) -> str | list[int]:
    if text == "all":
        return text
    try:
        return [int(name) for name in names_of(text)]
    except ValueError:
        raise UserError(f"--grids are tokens per frame, such as 1,4,16, or all; got {text!r}") from None


def probe_document(report: ProbeReport) -> Document:
    """The ranking, and the comparison with a sweep where there is one."""
    from trainer.ablation.document import Document

    sections = (_ranking(report), *((_agreement(report.agreement),) if report.agreement else ()))
    return Document(title="Probes of frozen features", sections=sections)


def _ranking(report: ProbeReport) -> Section:
    from trainer.ablation.document import Column, Estimate, Section

    columns = (
        *(Column(name=name) for name in ("encoders", "probe", "reads")),
        *(Column(name=name, unit="share") for name in ("accuracy", "balanced accuracy")),
    )
    rows = tuple(
        (
            "+".join(row.encoders),
            row.probe,
            row.reads,
            Estimate(value=row.accuracy, low=row.low, high=row.high),
            row.balanced_accuracy,
        )
        for row in report.rows
    )
    largest = max(report.classes, key=report.classes.__getitem__)
    notes = (
        f"{len(report.clips):,} clips of {report.videos:,} videos in {len(report.classes)} classes ({report.labels});"
        f" {report.store} at {report.snapshot}.",
        f"Chance: {report.majority:.1%} by always saying {largest!r}; balanced accuracy {1 / len(report.classes):.1%}.",
        f"{report.folds} folds, a video in one of them, seed {report.seed}; {report.draws:,} bootstrap draws.",
        *report.notes,
        *(f"{key}: {text}." for key, text in report.identities.items()),
        f"Memory: at most {format_bytes(report.memory_bytes)} of features and fits.",
        *(f"Left out: {count:,} {what}." for what, count in report.left_out.items()),
        *(f"Not computed: {what}: {reason}." for what, reason in report.not_computed.items()),
    )
    return Section(title="Probes of frozen features", columns=columns, rows=rows, notes=notes)


def _agreement(found: tuple[Agreement, ...]) -> Section:
    """A row per kind of probe and setting of the sweep."""
    from trainer.ablation.document import Column, Section
    from trainer.ablation.panel import seeds_text

    statistics = ("Spearman", "Spearman with one seed", "Spearman between two seeds")
    columns = (
        *(Column(name=name) for name in ("probe", "reads", "setting")),
        Column(name="sets", unit="count"),
        Column(name="seeds"),
        *(Column(name=name, unit="number") for name in statistics),
    )
    rows = tuple(
        (
            each.probe,
            each.reads,
            each.setting,
            len(each.subsets),
            seeds_text(each.seeds),
            each.spearman,
            each.single,
            each.ceiling,
        )
        for each in found
    )
    notes = [
        *(
            f"{each.probe} probes ({each.setting}): without {', '.join(each.without)}."
            for each in found
            if each.without
        ),
        "Spearman ranks the mean over seeds. With one seed and between two seeds are means over seeds and over pairs of"
        " them, comparable with each other: the second is the ceiling of the first.",
        "Intervals: 95%, bootstrap over the videos of probes and of questions, drawn independently, and over seeds.",
    ]
    title = "Probes and retrained runs rank sets of encoders"
    return Section(title=title, columns=columns, rows=rows, notes=tuple(dict.fromkeys(notes)))
