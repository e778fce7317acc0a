"""Options that name a judge of open-ended answers, for commands that score runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mervcache.console import stacked
from mervcache.errors import UserError

if TYPE_CHECKING:
    from trainer.judge import Judge

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
