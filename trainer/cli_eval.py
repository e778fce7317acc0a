"""Command line `merv-eval`: score, ask, export and import runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from mervcache.completion import complete_dataset, complete_store
from mervcache.config import parse_pairs
from mervcache.console import CONTEXT, echo, print_result, report_saved, stacked
from mervcache.errors import UserError, no_file
from mervcache.program import Program
from mervcache.text import printable
from trainer.cli import handle_cli_errors, load_torch_modules
from trainer.cli_examples import EXAMPLES
from trainer.cli_export import export_options, model_line, options_of, prompts_line, write_export
from trainer.config import Protocol, read_config
from trainer.loop.launch import end_with_failures, is_first_rank, is_launched, relaunch
from trainer.render import import_lines, print_losses, print_scores
from trainer.runs.stage_folders import check_are_trained, check_llm_is_there, last_stage

if TYPE_CHECKING:
    from trainer.judge import Judge

# -P: Python does not look for modules in the folder it is started from.
THIS_COMMAND = (sys.executable, "-P", "-m", "trainer.main", "eval")

dataset_options = stacked(
    click.option(
        "--dataset",
        shell_complete=complete_dataset,
        help="Decode and encode the clips of this dataset's questions, instead of --store.",
    ),
    click.option("--root", type=click.Path(file_okay=False), help="Folder of the dataset's media and annotations."),
    click.option(
        "--option",
        "options",
        metavar="KEY=VALUE",
        multiple=True,
        help="An option of the dataset; `merv-pipeline datasets NAME` lists them. Repeatable.",
    ),
)
protocol_options = stacked(
    click.option(
        "--protocol",
        type=click.Choice(get_args(Protocol)),
        show_default="letters, of a fresh LLM likelihood",
        help="letters: options in the prompt, first character of the answer; likelihood: the most likely option.",
    ),
    click.option(
        "--letters-template",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Text file with the prompt of --protocol letters: {question}, {letters}, {options}.",
    ),
)
answer_options = stacked(
    click.option(
        "--open-ended/--no-open-ended",
        default=None,
        show_default="those of benchmarks",
        help="Include all open-ended questions, also of training sets; or only multiple choice.",
    ),
    click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=512, help="Longest open-ended answer, in tokens."
    ),
    click.option(
        "--resume/--no-resume", "resumes", default=True, help="Read the predictions that the run's folder has already."
    ),
    click.option(
        "--processes",
        type=click.IntRange(min=1),
        help="Distribute the questions over this many processes, one per GPU.",
    ),
)
judge_options = stacked(
    click.option(
        "--judge",
        metavar="URL",
        help="Let a model behind an OpenAI-compatible endpoint judge open-ended answers, such as"
        " https://api.openai.com/v1. Answers are sent there; the key is read from OPENAI_API_KEY.",
    ),
    click.option("--judge-model", metavar="NAME", help="Model that judges, with its version where it has one."),
    click.option(
        "--judge-template",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Text file with the judge's prompt: [system], [user] with {question}, {correct}, {prediction}.",
    ),
    click.option("--judge-requests", type=click.IntRange(1, 256), default=8, help="Requests to the judge at once."),
)
CHECKPOINT = click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Folder of a run.")
STORE = click.option(
    "--store",
    shell_complete=complete_store,
    show_default="the one the run was trained on",
    help="Store of the clips' tokens.",
)
LLM = click.option(
    "--llm",
    metavar="FOLDER",
    show_default="as in training",
    help="Where the LLM is, if it has moved and is not in the run's folder.",
)


@click.group(cls=Program, context_settings=CONTEXT, epilog=EXAMPLES["eval"])
@click.version_option(package_name="merv-pipeline")
def eval_main() -> None:
    """Score trained runs, export them, import official checkpoints."""


@eval_main.command("run", epilog=EXAMPLES["run"])
@handle_cli_errors
@CHECKPOINT
@STORE
@dataset_options
@click.option(
    "--weights", metavar="SPEC", multiple=True, help="Weights of encoders that run now, as in ask. Repeatable."
)
@LLM
@click.option("--split", default="heldout", help="Split whose questions are scored.")
@click.option(
    "--baseline",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another run that answers the same questions, such as a text-only one. Repeatable.",
)
@click.option("--best", is_flag=True, help="Use the best checkpoint of every run by validation, not the newest.")
@click.option("--limit", type=click.IntRange(min=1), help="Score at most this many questions.")
@protocol_options
@answer_options
@judge_options
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Questions at once, with all their options.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON, answers included.")
def eval_run(checkpoint: Path, store: str | None, baseline: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Score benchmark questions by category, next to chance and baseline runs.

    Multiple choice by --protocol; open-ended answers are generated and matched, and judged with --judge. Every answer
    is kept at once, a line each in predictions/ of the run: the same command resumes after a kill.

    Exit code 3: questions were left out, because their clips have no tokens.
    """
    check_are_trained(checkpoint, *baseline)
    if options["llm"] is None:
        check_llm_is_there(last_stage(checkpoint))
    share_questions(options.pop("processes"))
    load_torch_modules()
    from trainer.evaluate import EvaluationRequest, evaluate_run

    judge, options["options"] = pop_judge(options), parse_pairs("--option", options["options"])
    result = evaluate_run(checkpoint, EvaluationRequest(store=store, judge=judge, **options), baseline)
    if is_first_rank():
        print_result(result, as_json, lambda: print_scores(result))
    if result["lost"]:
        end_with_failures()


@eval_main.command("distortion", epilog=EXAMPLES["distortion"])
@handle_cli_errors
@CHECKPOINT
@STORE
@click.option("--split", default="heldout", help="Split of the samples that the loss is measured on.")
@click.option("--limit", type=click.IntRange(min=1), default=256, help="Samples, at most.")
@click.option("--best", is_flag=True, help="The best checkpoint by validation instead of the newest.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def eval_distortion(checkpoint: Path, store: str | None, as_json: bool, **options: Any) -> None:
    """Validation loss on the stored tokens, and on the same tokens in each storage dtype.

    The result is saved in the store's journal, as that of `merv-pipeline distortion` is.
    """
    check_are_trained(checkpoint)
    load_torch_modules()
    from featurestore.quality import keep_record, to_record
    from trainer.distortion import measure_losses

    place, measured = measure_losses(checkpoint, store, **options)
    record = to_record(measured)
    report_saved(lambda: keep_record(place, record))
    print_result(record, as_json, lambda: print_losses(measured))


@eval_main.command("export", epilog=EXAMPLES["export"])
@handle_cli_errors
@CHECKPOINT
@export_options
def eval_export(checkpoint: Path, out: Path, kind: str, as_json: bool, **options: Any) -> None:
    """Export a run as a folder: safetensors, settings, tokenizer, model card.

    With --format prompt-embeds, the prompts of a store's questions as embeddings. Exit code 3: questions were left out,
    because their clips have no tokens.
    """
    given = options_of(kind, options)
    check_are_trained(checkpoint)
    load_torch_modules()
    found = write_export(kind, checkpoint, out, given)
    for note in found.get("notes", ()):
        echo(note)
    print_result(found, as_json, lambda: click.echo((model_line if kind == "model" else prompts_line)(found)))
    if found.get("without_tokens"):
        end_with_failures()


@eval_main.command("import-official", epilog=EXAMPLES["import-official"])
@handle_cli_errors
@click.argument("checkpoint_file", metavar="CHECKPOINT.pt", type=click.Path(path_type=Path))
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    required=True,
    help="The config.json of the checkpoint; YAML is read too.",
)
@click.option("--llm", required=True, help="Hub id or folder of the LLM it was trained from: tokenizer and sizes.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run to make.")
@click.option(
    "--store",
    shell_complete=complete_store,
    show_default="any with tokens of its sizes",
    help="Store whose tokens the run will read.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was imported as JSON.")
def eval_import_official(checkpoint_file: Path, config_file: Path, as_json: bool, **options: Any) -> None:
    """Import a checkpoint of princetonvisualai/merv as a run; reads only tensors, runs no code."""
    load_torch_modules()
    from trainer.official import import_official

    result = import_official(checkpoint_file, config_file, **options)
    print_result(result, as_json, lambda: click.echo("\n".join(import_lines(result))))


@eval_main.command("ask", epilog=EXAMPLES["ask"])
@handle_cli_errors
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
@LLM
@click.option("--json", "as_json", is_flag=True, help="Print questions and answers as JSON.")
def eval_ask(questions: tuple[str, ...], checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Answer QUESTIONS about a video or an image; without any, read them from the terminal, one per line."""
    if not questions and not is_terminal():
        raise UserError('what is the question? Give it behind the options: merv-eval ask ... "What happens?"')
    options["span"] = parse_span(options["span"])
    for path in (options["video"], options["image"]):
        if path is not None and not path.exists():  # before a run is loaded
            raise UserError(no_file(path))
    weights, llm = options.pop("weights"), options.pop("llm")
    check_are_trained(checkpoint)
    is_blind = read_config(last_stage(checkpoint)).mode == "text-only"
    if not is_blind and (options["video"] is None) == (options["image"] is None):
        raise UserError("this run reads visual tokens: give one video with --video or one image with --image")
    if llm is None:
        check_llm_is_there(last_stage(checkpoint))
    load_torch_modules()
    from trainer.ask import Asker  # torch

    with Asker(checkpoint, weights=weights, llm=llm) as asker:
        for note in asker.notes:
            echo(note)
        batches = [questions] if questions else ([line] for line in iter(_next_question, ""))
        for part in batches:
            answers = asker.answers(part, **options)
            if as_json:
                pairs = [{"question": q, "answer": a} for q, a in zip(part, answers, strict=True)]
                click.echo(json.dumps({"answers": pairs, "looked": asker.looks, "notes": asker.notes}))
            elif len(part) == 1:
                click.echo(printable(answers[0]))
            else:
                pairs = (f"Q: {question}\nA: {answer}" for question, answer in zip(part, answers, strict=True))
                click.echo(printable("\n\n".join(pairs)))


def is_terminal() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin.isatty()


def _next_question() -> str:
    """A line from the terminal; "" at an empty line or the end of input."""
    click.echo("? ", nl=False, err=True)  # only answers go to stdout
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


def share_questions(processes: int | None) -> None:
    """Replace this process by a launcher of several, where they are requested and this is none of them."""
    if processes is not None and processes > 1 and not is_launched():
        relaunch("ddp", processes, sys.argv[1:], program=THIS_COMMAND)


def pop_judge(options: dict[str, Any]) -> Judge | None:
    """Remove the options of `judge_options` and return what they name."""
    url, model, template, requests = (
        options.pop(name) for name in ("judge", "judge_model", "judge_template", "judge_requests")
    )
    if url is None and (model is not None or template is not None):
        raise UserError("--judge-model and --judge-template are of a judge: give --judge URL too")
    if url is None:
        return None
    if model is None:
        raise UserError("which model judges? Give --judge-model NAME, such as gpt-4o-mini-2024-07-18")
    from trainer.judge import Judge, JudgeTemplate  # torch

    return Judge(url=url, model=model, template=JudgeTemplate.read(template), concurrency=requests)
