"""What merv-train and merv-eval print for a person; programs get the same facts with --json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mervcache.console import plural
from trainer.config import TRAINED_SPLIT

if TYPE_CHECKING:
    from featurestore.quality import LossRecord

GB = 1e9
MAX_LISTED = 40  # open-ended answers that are printed one by one
PROTOCOLS = {
    "letters": "the options are in the prompt, and the first character of the answer is compared",
    "likelihood": "the option with the largest mean log-likelihood of its tokens is the answer",
}
MEMORY_PARTS = ("parameters", "gradients", "moments", "copies", "tokens", "activations", "logits", "total")


def print_dry_run(report: Mapping[str, Any]) -> None:
    """Print the result of a dry run, a column per stage."""
    from mervcache.console import console, table  # rich

    stages = report.get("stages") or {"": report}
    columns = [dry_run_rows(stage) for stage in stages.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    table(("", *stages), [(name, *(column.get(name, "-") for column in columns)) for name in names])
    for name, stage in stages.items():
        for line in stage.get("warnings", ()):
            console().print(f"{name}: {line}" if name else line, soft_wrap=True)


def dry_run_rows(report: Mapping[str, Any]) -> dict[str, str]:
    """Row name -> value of one stage."""
    text, memory = report["text_tokens"], report["memory_bytes"]
    context = f" of {report['context']:,}" if report["context"] else ""
    rows = {
        "steps": f"{report['steps']:,} of {report['batch_size']:,} samples",
        "samples": f"{report['samples']:,}",
        "dropped": _counts(report["dropped"]),
        "text tokens": f"median {text['median']:,}, longest {text['longest']:,}",
        "visual tokens": f"{report['visual_tokens']:,}",
        "longest sequence": f"{report['longest_sequence']:,}{context}",
    }
    if left := {name: count for name, count in report["unread"].items() if count}:
        rows["left over at the end"] = _counts({"samples" if name == "all" else name: n for name, n in left.items()})
    if report["cut"]:
        rows["texts cut"] = f"{report['cut']:,} at {report['text_limit']:,} tokens"
    if report["without_answer"]:
        rows["answer cut off"] = f"{report['without_answer']:,}"
    if report.get("without_placeholder"):
        rows["no placeholder"] = f"{report['without_placeholder']:,}, which begin with the visual tokens"
    for part, sizes in report["parameters"].items():
        rows[f"trained of {part}"] = f"{sizes['trained']:,} of {sizes['total']:,}"
    rows["micro-batch"] = report["micro_batch"]
    rows["besides padding"] = ", ".join(f"{part:.0%} with {limit}" for limit, part in report["useful_share"].items())
    rows["activation checkpointing"] = "on" if report["activation_checkpointing"] else "off"
    for part in MEMORY_PARTS:
        about = "about " if part in ("activations", "logits", "total") else ""  # of the longest texts at once
        rows[f"GB, {part}"] = f"{about}{memory[part] / GB:.3g}"
    if report["device_bytes"] is not None:
        rows["GB, device"] = f"{report['device_bytes'] / GB:.3g}"
    disk = report["checkpoints"]
    each = (disk["weights"] + disk["optimizer"]) / GB
    kept = f"{plural(disk['kept'], 'checkpoint')} of {each:.3g}: weights and optimizer"
    rows["GB on disk"] = f"{disk['kept'] * each:.3g} ({kept}), at most {disk['at_most'] / GB:.3g} while one is written"
    return rows | ({"starts from": report["init"]} if "init" in report else {})


def print_scores(result: Mapping[str, Any]) -> None:
    """Print scores by benchmark and category, next to chance and to the baseline runs, then what they are of."""
    from mervcache.console import console, table  # rich

    if result["scores"]:
        columns = ("questions about", "number", "accuracy", "chance", *result["beside"])
        table(columns, choice_rows(result), right=columns[1:])
    if "open_ended" in result:
        columns, rows = open_table(result["open_ended"])
        table(columns, rows, right=columns[1:])
        if len(answers := result["open_ended"]["answers"]) <= MAX_LISTED:
            table(("question", "right answer", "answer", ""), map(_answer_row, answers))
    for line in score_notes(result):
        console().print(line, markup=False, highlight=False, soft_wrap=True)


def _answer_row(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """An open-ended answer, by the judge's verdict where there is one."""
    verdict = answer["verdict"]
    is_right = answer["normalised"] if verdict is None else verdict["is_match"]
    mark = {True: "right", False: "wrong", None: "unreadable verdict"}[is_right]
    return answer["question"], answer["correct"], answer["text"], mark


def choice_rows(result: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows of multiple choice: over all, then by category, where there are several benchmarks for each of them."""
    parts = {"": result}
    if len(result.get("benchmarks", ())) > 1:
        parts = {"": {**result, "scores": result["scores"][:1]}, **result["benchmarks"]}
    rows = []
    for benchmark, part in parts.items():
        others = [{row["category"]: row for row in table} for table in part["beside"].values()]
        for row in part["scores"]:
            shares = (row, *(other[row["category"]] for other in others))
            accuracies = [f"{share['accuracy']:.2f}" for share in shares]
            name = _row_name(benchmark, row["category"])
            rows.append((name, row["questions"], accuracies[0], f"{row['chance']:.2f}", *accuracies[1:]))
    return rows


def open_table(report: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows of open-ended questions; the columns of a judge have its name."""
    judge = report["judge"]
    figures = {"exact": "exact", "normalised": "normalised"}
    if judge is not None:
        figures |= {"judge_accuracy": f"yes by {judge['version']}", "judge_score": f"score by {judge['version']}"}
    shown = "normalised" if judge is None else "judge_accuracy"
    others = [f"{run}: {figures[shown]}" for run in report["beside"]]
    rows = []
    for benchmark, scores in report["scores"].items():
        tables = [{row["category"]: row for row in found[benchmark]} for found in report["beside"].values()]
        for row in scores:
            values = [row[name] for name in figures] + [table[row["category"]][shown] for table in tables]
            rows.append((_row_name(benchmark, row["category"]), row["questions"], *(f"{v:.2f}" for v in values)))
    return ("open-ended questions of", "number", *figures.values(), *others), rows


def _row_name(benchmark: str, category: str) -> str:
    if not benchmark:
        return category
    return benchmark if category == "all" else f"{benchmark}: {category}"


def score_notes(result: Mapping[str, Any]) -> list[str]:
    """The protocol of an evaluation, ties and unreadable answers of every run, and the questions without a score."""
    lines = [f"Protocol {result['protocol']}: {PROTOCOLS[result['protocol']]}."] if result["scores"] else []
    if result["template"] is not None and result["scores"]:
        lines.append(f"Prompt: {result['template']['name']}, whose text is in the result.")
    for name, rows in {"": result["scores"], **result["beside"]}.items() if result["scores"] else ():
        overall = next(row for row in rows if row["category"] == "all")
        tied, unreadable, number = (overall[part] for part in ("tied", "unreadable", "questions"))
        of = f" of {name}" if name else ""
        if tied:
            lines.append(f"Ties{of}: {tied:,} of {number:,} questions; the right one of k best options counts 1/k.")
        if result["protocol"] == "letters":
            share = f"{unreadable / number:.1%}"
            lines.append(f"Unreadable answers{of}: {unreadable:,} of {number:,} ({share}), counted as wrong.")
    if result.get("split") == TRAINED_SPLIT:
        lines.append(
            f"Split {TRAINED_SPLIT}: runs are trained on these questions, so their scores say nothing about others."
        )
    if "open_ended" in result:
        lines += open_notes(result["open_ended"])
    for benchmark, outcomes in result["questions"].items():
        left = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items() if outcome != "scored")
        if left:
            lines.append(f"{benchmark}: {outcomes['scored']:,} of {sum(outcomes.values()):,} questions scored; {left}.")
    return lines


def open_notes(report: Mapping[str, Any]) -> list[str]:
    """How open-ended answers were compared, and which of them were cut or not judged."""
    lines = [f"Normalised: {report['normalisation']}."]
    if (judge := report["judge"]) is not None:
        prompt = judge["template"]["name"]
        lines.append(
            f"Judge: {judge['version']} at {judge['endpoint']}, prompt {prompt}; its scores compare with no other's."
        )
    for run, benchmarks in {"": report["scores"], **report["beside"]}.items():
        of = f" of {run}" if run else ""
        overall = [row for rows in benchmarks.values() for row in rows if row["category"] == "all"]
        number, cut = (sum(row[name] for row in overall) for name in ("questions", "unfinished"))
        if cut:
            lines.append(f"Cut answers{of}: {cut:,} of {number:,} at {report['max_new_tokens']:,} new tokens or less.")
        if unreadable := sum(row.get("judge_unreadable", 0) for row in overall):
            lines.append(f"Unreadable verdicts{of}: {unreadable:,} of {number:,}, counted as no with score 0.")
    return lines


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
        run = shlex.quote(results[-1]["run"])
        command = f'ask --checkpoint {run} --video FILE "What happens in the video?"'
        if results[-1]["num_questions"]:
            command = f"run --checkpoint {run}"
        lines[-1] += f"; next: merv-eval {command}"
    return lines + [line for result in results for line in lost_lines(result)]


def lost_lines(result: Mapping[str, Any]) -> list[str]:
    """What a run could not do because a number was not finite."""
    lines = []
    if skipped := result.get("skipped"):
        lines.append(
            f"{result['run']}: {plural(skipped, 'step')} of {result['steps']} changed nothing, because the loss or the"
            " gradient was not finite: `skipped` is 1 in their rows of metrics.jsonl"
        )
    if unranked := result.get("unranked"):
        lines.append(
            f"{result['run']}: {plural(unranked, 'validation')} gave a number that is not finite and took no part in"
            " choosing the best checkpoint: null in metrics.jsonl"
        )
    return lines


def import_lines(result: Mapping[str, Any]) -> list[str]:
    """What was imported, and what the checkpoint was bound to."""
    bound = result["bound_to"]
    rules = ", ".join(f"{encoder} {rule}" for encoder, rule in bound["frame_rules"].items())
    return [
        f"{result['run']}: step {result['step']}, encoders {', '.join(result['encoders'])}",
        f"prompt: {bound['prompt']}",
        f"frames: {rules}; {bound['image_resize_strategy']}",
        f"fusion: {bound['fusion']}",
        f"tokens: {bound['store'] or 'of no store yet; any of these sizes, frames and crop'}",
    ]


def _done(result: Mapping[str, Any]) -> str:
    steps, num_steps = result["steps"], result["num_steps"]
    if steps < num_steps:
        return f"stopped and saved at step {steps} of {num_steps}; go on with --resume auto"
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
    return f"step {steps} of {num_steps}, loss {loss}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"
