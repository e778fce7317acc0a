"""The model card of an exported model: README.md made from what the run recorded and nothing else.

What a reader must not overlook (random weights, a missing licence, scores of another step) is bold; what was not
recorded is called unknown. Text from data (categories, names of stores) is kept from becoming Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from featurestore.quality import parity_words
from mervcache.config import to_builtin
from mervcache.console import plural
from mervcache.text import one_line, redact
from trainer.config import TrainConfig, TrainLLM
from trainer.model.llm import FRESH_PREFIX
from trainer.runs.run_record import RunRecord

LIBRARY = "merv-pipeline"
UNKNOWN_LICENSE = "unknown"  # a value that model hubs know
TASK = "video-text-to-text"
LLM_TRAINING: dict[TrainLLM, str] = {
    "none": "frozen (`train_llm: none`)",
    "lora": "trained through LoRA adapters (`train_llm: lora`)",
    "full": "all weights trained (`train_llm: full`)",
}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The facts on the card."""

    name: str
    config: TrainConfig
    record: RunRecord
    step: int  # steps done
    llm_weights: str  # where the LLM's weights are, in words
    llm_revision: str | None  # commit of the Hub's LLM
    is_local_llm: bool = False  # it was a folder, and not a model hub's name
    license: str = UNKNOWN_LICENSE
    scores: Sequence[Mapping[str, Any]] = ()  # as trainer/runs/run_record.py reads them
    open_scores: Sequence[Mapping[str, Any]] = ()  # of open-ended answers, likewise
    losses: Sequence[float] = ()  # of the last steps before the checkpoint
    steps_trained: int | None = None  # by the whole run, of which the checkpoint may be an earlier one
    validation: Mapping[str, float | None] | None = None  # of the exported checkpoint; None: not finite
    skipped: int = 0  # of its steps, those that changed nothing because a number was not finite
    origin: Mapping[str, Any] | None = None  # of an imported checkpoint
    software: Mapping[str, str]  # that made the export


def model_card(facts: CardFacts) -> str:
    """The whole README.md: Markdown with the front matter that a model hub reads."""
    record = facts.record
    where, source = ("--store STORE", "of a feature store")
    if facts.config.train_encoders:  # no store holds their tokens
        where, source = ("--dataset NAME --root DIR", "of a dataset, decoded and encoded as it goes")
    dropped = ", ".join(f"{count} {_clean(reason)}" for reason, count in record.dropped.items()) or "none"
    licence = f"`{_clean(facts.license)}`."
    if facts.license == UNKNOWN_LICENSE:
        licence = "**To be filled in by who publishes it: `license` at the top of this card.**"
    sections = {
        "Load it": "```python\nfrom trainer import load_run\n\n"
        'run = load_run("path/to/this/folder")\n'
        "model, renderer = run.built.model, run.built.renderer\n```\n\n"
        f"`merv-eval run --checkpoint path/to/this/folder {where}` scores it on the questions {source}.",
        "What was random": _bullets(random_parts(facts)),
        "Encoders": _encoders(record),
        "Data": _bullets(
            [
                f"Data digest: `{_clean(record.data_digest)}`",
                f"Samples: {record.num_samples:,}; dropped: {dropped}",
                f"Store: {_clean(Path(record.store).name) or 'not recorded'}",
            ]
        ),
        "Training": _training(facts),
        "Scores": "\n\n".join(
            [
                *(_score_table(scores, facts.step) for scores in facts.scores),
                *(_open_score_table(scores, facts.step) for scores in facts.open_scores),
            ]
        )
        or "Not evaluated: `merv-eval run --checkpoint RUN` before the export puts its scores here.",
        "Settings": f"```yaml\n{_settings(facts.config)}```",
        "Software": _table(
            ("package", "in training", "at export"),
            (
                (name, record.software.get(name, "not recorded"), facts.software.get(name, "-"))
                for name in {**record.software, **facts.software}
            ),
        ),
        "Licence": f"{licence} The licences of the LLM, of the encoders' weights and of the data apply as well.",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{_front_matter(facts)}\n# {_clean(facts.name)}\n\n{_summary(facts)}\n\n{body}\n"


def random_parts(facts: CardFacts) -> list[str]:
    """A line for each part that started from random weights, or of which that is not recorded."""
    config, lines = facts.config, []
    for encoder in facts.record.shapes:
        label = facts.record.encoders.get(encoder, {}).get("weights")
        if label is None:
            lines.append(f"Encoder {encoder}: not recorded whether its weights were trained.")
        elif label.startswith("random"):
            lines.append(f"**Encoder {encoder} has seeded random weights (`{label}`): it was never trained.**")
    if config.llm.startswith(FRESH_PREFIX):
        lines.append(
            f"**The LLM (`{config.llm}`) started from fresh weights, seed {config.seed}, and knows only the words of"
            " its training samples.**"
        )
    if facts.origin is None and facts.record.shapes:
        start = f"from the run `{_clean(config.init)}`" if config.init else f"from seed {config.seed}"
        lines.append(f"Projectors and fusion started {start} and were trained; the order of the data follows the seed.")
    return lines or ["Nothing that is recorded."]


def hub_id(llm: str) -> str | None:
    """The LLM's name where it is a model hub's: not fresh, not a folder."""
    return llm if HUB_ID.fullmatch(llm) and not Path(llm).exists() else None


def _front_matter(facts: CardFacts) -> str:
    """YAML between two lines of dashes; its model index holds the overall accuracy of every evaluation."""
    base = None if facts.is_local_llm else hub_id(facts.config.llm)
    results = [
        {
            "task": {"type": TASK, "name": f"multiple choice by {record['protocol']}"},
            "dataset": {"type": _stem(record), "name": _stem(record), "split": record["split"]},
            "metrics": [
                {
                    "type": "accuracy",
                    "value": row["accuracy"],
                    "name": f"accuracy by {record['protocol']}, chance {row['chance']:.3f}",
                }
            ],
        }
        for record in facts.scores
        for row in record["scores"][:1]
    ]
    values = {
        "license": facts.license,
        "library_name": LIBRARY,
        "pipeline_tag": TASK,
        "tags": ["video", "multi-encoder", "merv", facts.config.fusion.name, *facts.record.shapes],
        **({"base_model": [base]} if base else {}),
        **(
            {"metrics": ["accuracy"], "model-index": [{"name": facts.name, "results": results}]} if facts.scores else {}
        ),
    }
    text = yaml.safe_dump(values, sort_keys=False)
    open_line = f"license: {UNKNOWN_LICENSE}\n"
    text = text.replace(open_line, f"license: {UNKNOWN_LICENSE}  # fill in before you publish it\n", 1)
    return f"---\n{text}---\n"


def _summary(facts: CardFacts) -> str:
    encoders = ", ".join(facts.record.shapes) or "no encoder (text only)"
    fusion = f", fused by `{facts.config.fusion.name}`" if len(facts.record.shapes) > 1 else ""
    counts = "; ".join(
        f"{part} {sizes['total']:,} ({sizes['trained']:,} trained)" for part, sizes in facts.record.parameters.items()
    )
    source = f"\n\nImported from a checkpoint of {_clean(facts.origin['source'])}." if facts.origin else ""
    llm = (
        f"the local LLM `{_clean(Path(facts.config.llm).name)}`"
        if facts.is_local_llm
        else f"`{_clean(facts.config.llm)}`"
    )
    revision = f" at revision `{facts.llm_revision}`" if facts.llm_revision else ""
    return (
        f"A VideoLLM: visual tokens of {encoders}{fusion}, in front of {llm}{revision}."
        f" {facts.record.num_visual_tokens} visual tokens per clip. {facts.llm_weights}{source}\n\n"
        f"Parameters: {counts}."
    )


def _encoders(record: RunRecord) -> str:
    """What made the tokens; encoders.json holds every field."""
    rows = []
    for encoder, shape in record.shapes.items():
        facts = record.encoders.get(encoder, {})
        identity = facts.get("identity", {})
        weights = (
            f"{facts.get('weights', 'not recorded')}, sha256 {identity.get('weights_sha256', 'not recorded')[:12]}"
        )
        grid = f"{'x'.join(map(str, shape.grid))} of width {shape.width}"
        parity = parity_words(facts.get("parity"))
        rows.append((encoder, f"`{shape.identity}`", identity.get("layer", "not recorded"), weights, grid, parity))
    if not rows:
        return "None: this is the text-only baseline."
    table = _table(("encoder", "identity of its tokens", "output", "weights", "tokens T x H x W", "parity"), rows)
    return f"{table}\n\nEvery field of the identities, preprocessing included, is in `encoders.json`."


def _settings(config: TrainConfig) -> str:
    """Every setting as YAML; of clips left out their number, since config.yaml lists them."""
    settings = to_builtin(asdict(config))
    if config.exclude:
        settings["exclude"] = f"{plural(len(config.exclude), 'clip')}, listed in config.yaml"
    return yaml.safe_dump(settings, sort_keys=False)


def _training(facts: CardFacts) -> str:
    config, losses = facts.config, facts.losses
    loss = "Training loss: not recorded"
    if losses:
        loss = f"Training loss, mean of the last {len(losses)} steps: {sum(losses) / len(losses):.4f}"
    lines = [
        f"Steps: {facts.step} of {facts.record.num_steps}, {config.batch_size} samples each",
        f"LLM: {LLM_TRAINING[config.train_llm]}; loss `{config.loss}`",
        loss,
        *(
            f"Validation of this checkpoint, {name}{' by likelihood' * (name == 'val_accuracy')}:"
            f" {'not finite' if value is None else f'{value:.4f}'}"
            for name, value in (facts.validation or {}).items()
        ),
    ]
    if config.mode == "text-only":
        lines.append("Without visual tokens: the baseline to compare scores with")
    if facts.skipped:
        lines.append(f"**{facts.skipped} of these steps changed nothing: their loss or gradient was not finite.**")
    if facts.steps_trained is not None and facts.steps_trained < facts.record.num_steps:
        lines.append(f"**The run was stopped early, after {facts.steps_trained} of {facts.record.num_steps} steps.**")
    if facts.record.started_from:
        lines.append(f"Started from: {_clean(facts.record.started_from)}")
    if facts.origin:
        lines.append(f"Imported file: `{_clean(facts.origin['file'])}`, sha256 `{_clean(facts.origin['sha256'])}`")
    return _bullets(lines)


def _score_table(record: Mapping[str, Any], step: int) -> str:
    """One evaluation: a row per category, a column for each other run."""
    others = {Path(name).name: {row["category"]: row for row in rows} for name, rows in record["beside"].items()}
    rows = [
        (
            row["category"],
            row["questions"],
            f"{row['accuracy']:.3f}",
            f"{row['chance']:.3f}",
            *(
                f"{other[row['category']]['accuracy']:.3f}" if row["category"] in other else "-"
                for other in others.values()
            ),
        )
        for row in record["scores"]
    ]
    head = f"{_place(record)} by protocol `{record['protocol']}`, {_state(record, step)}"
    table = _table(("questions about", "number", "accuracy", "chance", *others), rows)
    return f"{head}\n\n{table}{_score_notes(record)}"


def _open_score_table(record: Mapping[str, Any], step: int) -> str:
    """Open-ended answers of one evaluation: a row per benchmark and category."""
    judge = record["judge"]
    columns = ["benchmark", "questions about", "number", "exact", "normalised"]
    columns += ["judge: accuracy", "judge: score 0-5", "judge: unreadable"] if judge else []
    values = {
        "exact": ".3f",
        "normalised": ".3f",
        "judge_accuracy": ".3f",
        "judge_score": ".2f",
        "judge_unreadable": "",
    }
    rows = [
        (
            benchmark,
            row["category"],
            row["questions"],
            *(format(row[name], values[name]) for name in values if name in row),
        )
        for benchmark, found in record["scores"].items()
        for row in found
    ]
    others = {Path(name).name for name in record["beside"]}
    notes = [f"Answers of at most {record['max_new_tokens']} tokens, greedy"]
    if judge:
        notes.append(
            f"Judge: `{_clean(judge['version'])}` with the prompt `{_clean(judge['template']['name'])}`, sha256"
            f" `{_clean(judge['template']['sha256'][:12])}`; scores of other judges are not comparable"
        )
    else:
        notes.append("No judge: exact and normalised matches are stricter than one, and not comparable with its scores")
    if others:
        notes.append(f"Scored alongside {', '.join(sorted(map(_clean, others)))}, whose scores are in the run's folder")
    head = f"{_place(record)}, open-ended answers, {_state(record, step)}"
    return f"{head}\n\n{_table(columns, rows)}\n\n{_bullets(notes)}"


def _place(record: Mapping[str, Any]) -> str:
    return f"Split `{_clean(record['split'])}` of `{_stem(record)}`"


def _state(record: Mapping[str, Any], step: int) -> str:
    part = f", the first {record['limit']} questions only" if record.get("limit") else ""
    stale = "" if record["step"] == step else f" **These are scores of step {record['step']}, not of this checkpoint.**"
    return f"snapshot `{_clean(record['snapshot'])}`{part}.{stale}"


def _score_notes(record: Mapping[str, Any]) -> str:
    """Ties, unreadable answers and questions without a score, where they were recorded."""
    overall = record["scores"][0] if record["scores"] else {}
    lines = []
    if overall.get("tied"):
        lines.append(f"Ties: {overall['tied']}; one of k best options counts 1/k")
    if record["protocol"] == "letters":
        lines.append(f"Unreadable answers, counted as wrong: {overall.get('unreadable', 0)}")
    if record.get("template"):
        lines.append(f"Prompt: `{_clean(record['template']['name'])}`: `{_clean(record['template']['text'])}`")
    for benchmark, outcomes in record.get("questions", {}).items():
        if len(outcomes) > 1:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
            lines.append(f"{_clean(benchmark)}: {counts}")
    return f"\n\n{_bullets(lines)}" if lines else ""


def _stem(record: Mapping[str, Any]) -> str:
    return _clean(Path(record.get("store") or "unknown").stem)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(_clean(str(cell)).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _clean(text: str) -> str:
    """The text on one line, without HTML, credentials and control characters."""
    return one_line(redact(str(text))).replace("<", "&lt;")
