"""Options of `merv-eval run`: dataset, protocols, open-ended questions, their judge, and processes that answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from mervcache.completion import complete_dataset
from mervcache.console import stacked
from mervcache.errors import UserError
from trainer.config import Protocol
from trainer.loop.launch import is_launched, relaunch

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
