"""Command line of trained runs: `merv-eval`. Thin: parse, call one function of the house, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from mervcache.console import CONTEXT, say, show_result, tell_kept
from mervcache.errors import UserError
from trainer.command import heavy_rooms, no_file, says_errors
from trainer.runs.chain import check_are_runs
from trainer.tell import print_losses, print_scores

CHECKPOINT = click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Folder of a run.")
OWN_STORE = "the one the run was trained on"


@click.group(context_settings=CONTEXT)
def eval_main() -> None:
    """Measure trained runs, give them away, take in others."""


@eval_main.command("run")
@says_errors
@CHECKPOINT
@click.option("--store", show_default=OWN_STORE, help="Store of the questions' clips.")
@click.option("--dataset", help="Decode and encode the clips of this dataset's questions now, instead of --store.")
@click.option("--root", type=click.Path(file_okay=False), help="Folder of the dataset's media and annotations.")
@click.option(
    "--weights", metavar="SPEC", multiple=True, help="Of encoders that run now: where they are; as in ask. Repeatable."
)
@click.option("--split", default="heldout", help="Split whose questions are asked.")
@click.option(
    "--beside",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another run that answers the same questions, such as a text-only one. Repeatable.",
)
@click.option("--best", is_flag=True, help="Of every run, the best checkpoint by validation instead of the newest.")
@click.option("--limit", type=click.IntRange(min=1), help="Ask at most so many questions.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Questions at once, with all their options.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON, answers included.")
def eval_run(checkpoint: Path, store: str | None, beside: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Multiple-choice accuracy by category, beside chance and beside other runs."""
    check_are_runs(checkpoint, *beside)
    heavy_rooms()
    from trainer.evaluate import EvaluationRequest, evaluate_run

    result = evaluate_run(checkpoint, EvaluationRequest(store=store, **options), beside)
    show_result(result, as_json, lambda: print_scores(result))


@eval_main.command("distortion")
@says_errors
@CHECKPOINT
@click.option("--store", show_default=OWN_STORE, help="Store of the tokens.")
@click.option("--split", default="heldout", help="Split whose samples the loss is of.")
@click.option("--limit", type=click.IntRange(min=1), default=256, help="Samples, at most.")
@click.option("--best", is_flag=True, help="The best checkpoint by validation instead of the newest.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def eval_distortion(checkpoint: Path, store: str | None, as_json: bool, **options: Any) -> None:
    """Validation loss on the stored tokens, and on the same tokens in each storage dtype.

    The result is kept in the store's journal, beside what `merv-pipeline distortion` measures.
    """
    check_are_runs(checkpoint)
    heavy_rooms()
    from featurestore.quality import distortion_record, keep_record
    from trainer.distortion import measure_losses

    place, measured = measure_losses(checkpoint, store, **options)
    record = distortion_record(measured)
    tell_kept(lambda: keep_record(place, record))
    show_result(record, as_json, lambda: print_losses(measured))


@eval_main.command("export")
@says_errors
@CHECKPOINT
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make; it must not exist.")
@click.option("--best", is_flag=True, help="The best checkpoint by validation instead of the newest.")
@click.option("--name", show_default="the folder's name", help="Title of the model card.")
@click.option("--license", default="unknown", help="Licence in the card's head, such as apache-2.0.")
@click.option("--with-llm", is_flag=True, help="Copy a frozen LLM's weights too, instead of naming the LLM.")
@click.option("--merge-lora", is_flag=True, help="Add LoRA adapters to the LLM's weights, instead of a peft folder.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def eval_export(checkpoint: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write a run as a folder to give away: safetensors, settings, tokenizer, model card."""
    check_are_runs(checkpoint)
    heavy_rooms()
    from trainer.give.export import export_run

    result = export_run(checkpoint, out, **options)
    words = f"{result['out']}: step {result['step']}, {result['bytes'] / 1e6:.1f} MB; fill in the licence in README.md"
    show_result(result, as_json, lambda: click.echo(words))


@eval_main.command("import-official")
@says_errors
@click.argument("checkpoint_file", metavar="CHECKPOINT.pt", type=click.Path(path_type=Path))
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    required=True,
    help="The config.json that lies beside the checkpoint; YAML is read too.",
)
@click.option("--llm", required=True, help="Hub id or folder of the LLM it was trained from: tokenizer and sizes.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run to make.")
@click.option("--store", show_default="any with tokens of its sizes", help="Store whose tokens the run will read.")
@click.option("--json", "as_json", is_flag=True, help="Print what was imported as JSON.")
def eval_import_official(checkpoint_file: Path, config_file: Path, as_json: bool, **options: Any) -> None:
    """Make a run of a checkpoint of princetonvisualai/merv; only tensors are read from it, no code is run."""
    heavy_rooms()
    from trainer.give.official import import_official

    result = import_official(checkpoint_file, config_file, **options)
    words = f"{result['run']}: step {result['step']}, encoders {', '.join(result['encoders'])}"
    show_result(result, as_json, lambda: click.echo(words))


@eval_main.command("ask")
@says_errors
@click.argument("questions", nargs=-1)
@CHECKPOINT
@click.option("--video", type=click.Path(path_type=Path), help="Video file, or a folder of frames.")
@click.option("--image", type=click.Path(path_type=Path), help="Image file.")
@click.option("--span", metavar="START,END", help="Part of the video, in seconds; either may be left out.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, help="Longest answer, in tokens.")
@click.option(
    "--weights",
    metavar="SPEC",
    multiple=True,
    show_default="as in training",
    help="Where encoders' weights are: hub, a folder or random:SEED; or NAME=SPEC. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print questions and answers as JSON.")
def eval_ask(questions: tuple[str, ...], checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Answer QUESTIONS about a video or an image; without any, ask at the terminal, one a line."""
    if not questions and not is_terminal():
        raise UserError('what is the question? Give it behind the options: merv-eval ask ... "What happens?"')
    options["span"] = parse_span(options["span"])
    for path in (options["video"], options["image"]):
        if path is not None and not path.exists():  # said before a run is loaded for it
            raise UserError(no_file(path))
    weights = options.pop("weights")
    check_are_runs(checkpoint)
    heavy_rooms()
    from trainer.ask import Asker  # torch

    with Asker(checkpoint, weights=weights) as asker:
        for note in asker.notes:
            say(note)
        asked = [questions] if questions else ([line] for line in iter(_next_question, ""))
        for part in asked:
            answers = asker.answers(part, **options)
            if as_json:
                pairs = [{"question": q, "answer": a} for q, a in zip(part, answers, strict=True)]
                click.echo(json.dumps({"answers": pairs, "looked": asker.looks, "notes": asker.notes}))
            else:
                click.echo("\n".join(answers))


def is_terminal() -> bool:
    """Whether a person sits at standard input."""
    return sys.stdin.isatty()


def _next_question() -> str:
    """A line from the terminal; "" ends, and so does the end of input."""
    click.echo("? ", nl=False, err=True)  # answers alone go to stdout
    return sys.stdin.readline().strip()


def parse_span(text: str | None) -> tuple[float | None, float | None]:
    """`"1.5,4"`, `",4"` or `"1.5,"` in seconds."""
    if text is None:
        return None, None
    parts = text.split(",")
    try:
        if len(parts) != 2:
            raise ValueError
        start, end = (float(part) if part.strip() else None for part in parts)
    except ValueError:
        raise UserError(f"--span is START,END in seconds, such as 1.5,4 or ,4; got {text!r}") from None
    return start, end
