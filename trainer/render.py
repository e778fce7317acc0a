"""What merv-train and merv-eval print for a person; programs get the same facts with --json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurestore.quality import LossRecord

GB = 1e9
MEMORY_PARTS = ("parameters", "gradients", "moments", "tokens", "activations", "total")


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print the result of a dry run, a column per stage."""
    from mervcache.console import table  # rich

    stages = plan.get("stages") or {"": plan}
    columns = [plan_rows(stage) for stage in stages.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    table(("", *stages), [(name, *(column.get(name, "-") for column in columns)) for name in names])


def plan_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    """Row name -> value of one stage."""
    text, memory = plan["text_tokens"], plan["memory_bytes"]
    context = f" of {plan['context']:,}" if plan["context"] else ""
    rows = {
        "steps": f"{plan['steps']:,} of {plan['batch_size']:,} samples",
        "samples": f"{plan['samples']:,}",
        "dropped": _counts(plan["dropped"]),
        "unread": _counts(plan["unread"]),
        "text tokens": f"median {text['median']:,}, longest {text['longest']:,}",
        "visual tokens": f"{plan['visual_tokens']:,}",
        "longest sequence": f"{plan['longest_sequence']:,}{context}",
    }
    if plan["cut"]:
        rows["texts cut"] = f"{plan['cut']:,} at {plan['text_limit']:,} tokens"
    if plan["without_answer"]:
        rows["answer cut off"] = f"{plan['without_answer']:,}"
    if plan.get("without_placeholder"):
        rows["no placeholder"] = f"{plan['without_placeholder']:,}, which begin with the visual tokens"
    for part, sizes in plan["parameters"].items():
        rows[f"trained of {part}"] = f"{sizes['trained']:,} of {sizes['total']:,}"
    for part in MEMORY_PARTS:
        about = "about " if part in ("activations", "total") else ""  # activations are a rough formula
        rows[f"GB, {part}"] = f"{about}{memory[part] / GB:.3g}"
    return rows | ({"starts from": plan["init"]} if "init" in plan else {})


def print_scores(result: Mapping[str, Any]) -> None:
    """Print accuracy by category, next to chance and to the baseline runs."""
    from mervcache.console import table  # rich

    columns = ("questions about", "number", "accuracy", "chance", *result["beside"])
    others = [{row["category"]: row for row in rows} for rows in result["beside"].values()]
    rows = []
    for row in result["scores"]:
        shares = (row, *(other[row["category"]] for other in others))
        accuracies = [f"{share['accuracy']:.2f}" for share in shares]
        rows.append((row["category"], row["questions"], accuracies[0], f"{row['chance']:.2f}", *accuracies[1:]))
    table(columns, rows, right=columns[1:])


def print_losses(record: LossRecord) -> None:
    """A line per dtype, then what it was measured on."""
    from featurestore.quality import loss_notes, loss_table
    from mervcache.console import console, table

    columns, rows = loss_table(record)
    table(columns, rows, right=columns[1:])
    for note in loss_notes(record):
        console().print(note)


def result_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per stage that was trained; the last one says what to do next."""
    lines = [f"{result['run']}: {_done(result)}" for result in results]
    if lines and results[-1]["steps"] == results[-1]["num_steps"]:
        lines[-1] += f"; next: merv-eval run --checkpoint {results[-1]['run']}"
    return lines


def _done(result: Mapping[str, Any]) -> str:
    steps, num_steps = result["steps"], result["num_steps"]
    if steps < num_steps:
        return f"stopped and saved at step {steps} of {num_steps}; go on with --resume auto"
    return f"step {steps} of {num_steps}, loss {result['loss']:.4f}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"
