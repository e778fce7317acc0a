"""Options of `merv-eval export` that choose what is written: the model, or the prompts of a store's questions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mervcache.completion import complete_store
from mervcache.console import stacked
from mervcache.errors import UserError

OF_MODEL, OF_PROMPTS = ("name", "license", "with_llm", "merge_lora"), ("store", "split", "limit")
export_options = stacked(
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make; it must not exist."),
    click.option("--best", is_flag=True, help="The best checkpoint by validation instead of the newest."),
    click.option("--name", show_default="the folder's name", help="Title of the model card."),
    click.option("--license", show_default="unknown", help="Licence in the card's head, such as apache-2.0."),
    click.option("--with-llm", is_flag=True, help="Copy a frozen LLM's weights too, instead of naming the LLM."),
    click.option(
        "--merge-lora", is_flag=True, help="Add LoRA adapters to the LLM's weights, instead of a peft folder."
    ),
    click.option(
        "--format",
        "kind",
        type=click.Choice(["model", "prompt-embeds"]),
        default="model",
        help="model: the run itself. prompt-embeds: prompts of questions with their visual tokens, for vLLM.",
    ),
    click.option(
        "--store",
        shell_complete=complete_store,
        show_default="the one the run was trained on",
        help="prompt-embeds: store of the questions.",
    ),
    click.option("--split", show_default="heldout", help="prompt-embeds: split of the questions."),
    click.option("--limit", type=click.IntRange(min=1), help="prompt-embeds: at most this many questions."),
    click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON."),
)


def options_of(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options given of a format; UserError for those of the other one."""
    other, wanted = (OF_PROMPTS, "prompt-embeds") if kind == "model" else (OF_MODEL, "model")
    given = {name: value for name, value in options.items() if value not in (None, False)}
    if misplaced := [f"--{name.replace('_', '-')}" for name in other if name in given]:
        raise UserError(f"{', '.join(misplaced)}: for --format {wanted}, and the format is {kind}")
    return given


def model_line(found: Mapping[str, Any]) -> str:
    """What an export of a model wrote."""
    return f"{found['out']}: step {found['step']}, {found['bytes'] / 1e6:.1f} MB; fill in the licence in README.md"


def prompts_line(found: Mapping[str, Any]) -> str:
    """What an export of prompts wrote."""
    line = f"{found['out']}: {found['prompts']} prompts of step {found['step']}, {found['bytes'] / 1e6:.1f} MB"
    line += f"; serve them with {'the trained LLM of the run' if found['llm_is_trained'] else found['llm']}"
    return f"{line}; {found['without_tokens']} questions without tokens" if found["without_tokens"] else line


def write_export(kind: str, checkpoint: Path, out: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write an export of a kind; returns what was written."""
    if kind == "model":
        from trainer.runs.export import export_run  # torch

        return export_run(checkpoint, out, **options)
    from trainer.prompt_embeds import export_prompt_embeds

    return export_prompt_embeds(checkpoint, out, **options)
