"""One self-contained HTML page about a sweep or a run: `merv-eval report`.

Scores with intervals, the lattice of subsets, question categories, learning curves, score against cost, every table,
where it all comes from, and the commands that make it again. No scripts, no links: it can be mailed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from featurestore.quality import parity_words
from mervcache.errors import UserError
from mervcache.files import replace_text
from mervcache.page import Markup, cards, escaped, make_page, note, table
from mervcache.text import shareable
from trainer.ablation.costs_table import SweepCosts, measure_costs
from trainer.ablation.document import Document, Estimate, NotComputed, Section
from trainer.ablation.figures import read_scores
from trainer.ablation.importance import ENCODERS
from trainer.ablation.panel import ACCURACY
from trainer.ablation.render import (
    blocks,
    cell_text,
    column_heading,
    read_json,
    section_notes,
    without_constants,
)
from trainer.ablation.report_parts import (
    OPEN_ROWS,
    categories_part,
    costs_part,
    curves_part,
    folded,
    lattices_part,
    methods_of,
    scores_part,
    section_plot,
)
from trainer.ablation.statistics import DRAWS
from trainer.ablation.subject import Subject, read_subject
from trainer.ablation.sweep import RETRAINED
from trainer.ablation.table import make_table
from trainer.render import PROTOCOLS

RANDOM = "random:"  # begins the label of seeded weights
FRESH = "fresh:"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A page, and what it lacks."""

    path: Path
    missing: tuple[str, ...]


def write_report(
    path: Path,
    *,
    out: Path | None = None,
    split: str | None = None,
    protocol: str | None = None,
    store: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    text_tokens: int | None = None,
    ranks: bool = False,
    tables: Sequence[Path] = (),
) -> Written:
    """Write the page of a sweep or a run, by default as NAME-report.html next to its folder.

    `tables` are files that other commands wrote as JSON, such as probes, which the page shows too.
    """
    others = [read_json(table) for table in tables]
    subject = read_subject(path, split=split, protocol=protocol, store=store)
    document = costs = None
    if subject.results:
        places = {"store": store, "text_tokens": text_tokens}
        costs = measure_costs(subject.results, subject.runs, with_ranks=ranks, **places)
        document = make_table(subject.results, folders=subject.runs, costs=costs, draws=draws, seed=seed)
    target = out or subject.path.resolve().with_name(f"{subject.name}-report.html")
    try:
        replace_text(target, page(subject, document, costs, others))
    except OSError as error:
        raise UserError(f"the page cannot be written to {target}: {error.strerror}; give another --out") from error
    return Written(path=target, missing=document.missing if document else ())


def page(
    subject: Subject, document: Document | None, costs: SweepCosts | None = None, others: Sequence[Document] = ()
) -> str:
    """The whole page as text."""
    parts: list[tuple[str, str]] = []
    if subject.results and document:
        methods = methods_of(subject)
        scores = read_scores(document, subject.results, methods)
        parts += [
            ("Scores", scores_part(subject, subject.results, scores)),
            ("Lattice of subsets", lattices_part(scores, subject.results.encoders)),
            ("Accuracy by category of questions", categories_part(subject.results, methods)),
        ]
    else:
        parts.append(("Scores", note(f"Not scored: run merv-eval run --checkpoint {subject.path}, then this again.")))
    parts.append(("Learning curves", curves_part(subject)))
    if subject.results and document:
        parts += [("Accuracy against cost", costs_part(subject.results, scores, costs))] if costs else []
        parts.append(("Tables", _tables(subject, document)))
    parts += [(other.title, _other_tables(other)) for other in others]
    parts += [("Provenance", provenance(subject)), ("Make it again", commands(subject))]
    if document:
        parts += [("Methods", _list(document.methods)), ("Footnotes", _list(document.footnotes))]
    parts = [(title, content) for title, content in parts if content]
    links = "".join(f"<a href='#part{index}'>{escaped(title)}</a>" for index, (title, _) in enumerate(parts))
    body = "".join(f"<h2 id='part{i}'>{escaped(title)}</h2>\n{content}\n" for i, (title, content) in enumerate(parts))
    kind = "Ablation" if subject.is_sweep else "Run"
    notices = [*warnings(subject), *(f"Incomplete: {line}" for line in (document.missing if document else ()))]
    whole = make_page(
        title=f"{kind} {subject.name}",
        subtitle=_subtitle(subject),
        notices=notices,
        style=(files("trainer.ablation") / "report.css").read_text(),
        body=Markup(f"{cards(_cards(subject, document))}<nav>{links}</nav>{body}"),
    )
    return without_folders(whole, local_paths(subject))


def local_paths(subject: Subject) -> set[str]:
    """Absolute paths of this machine in what the page is about."""
    values = [
        *(str(path) for path in (subject.path.absolute(), subject.path.resolve())),
        *(subject.results.record.values() if subject.results else ()),
        *(value for record in subject.records.values() for value in (record.store, *(record.live or {}).values())),
        *(value for config in subject.configs.values() for value in vars(config).values()),
        *(subject.scores["beside"] if subject.scores else ()),
    ]
    return {value for value in values if isinstance(value, str) and Path(value).is_absolute() and Path(value).name}


def without_folders(page: str, paths: Iterable[str]) -> str:
    """The page with these paths as their names: it is mailed, and folders of a machine name its users."""
    for path in sorted(paths, key=len, reverse=True):
        page = page.replace(escaped(path), escaped(Path(path).name))
    return page


def _subtitle(subject: Subject) -> str:
    if not subject.results:
        return "not scored yet"
    record = subject.results.record
    return (
        f"{', '.join(subject.results.encoders) or 'text only'} · {len(subject.results.questions):,} questions of split"
        f" {record['split']} by {record['protocol']} · snapshot {record['snapshot']}"
    )


def _cards(subject: Subject, document: Document | None) -> dict[str, str]:
    found: dict[str, str] = {}
    if subject.is_sweep and subject.results:
        planned, lacking = len(subject.results.record["runs"]), {member.run for member in subject.results.missing}
        found["runs scored"] = f"{planned - len(lacking)}" + (f" of {planned}" if lacking else "")
    if not subject.is_sweep:
        found["steps"] = f"{next(iter(subject.records.values())).num_steps:,}"
    if not subject.results or not document:
        return found
    results = subject.results
    scored = [s for s in read_scores(document, results, methods_of(subject)) if s.estimate and s.block == RETRAINED]
    whole = [s.value for s in scored if s.subset == results.encoders]
    if whole:
        found["best of all encoders" if len(whole) > 1 else "all encoders"] = f"{100 * max(whole):.1f} %"
    if none := [s.value for s in scored if not s.subset and results.encoders]:
        found["text only"] = f"{100 * max(none):.1f} %"
    found["chance"] = f"{100 * results.questions.chance:.1f} %"
    found["questions"] = f"{len(results.questions):,}"
    found["videos"] = f"{len(set(results.questions.videos)):,}"
    return found


def _tables(subject: Subject, document: Document) -> Markup:
    """Every table of `merv-eval table`."""
    parts = []
    for heading, sections in blocks(document):
        shown = [s for s in map(without_constants, sections) if subject.is_sweep or _says_something(s)]
        if not shown:
            continue
        if not subject.is_sweep and sections[0].block == RETRAINED:
            heading = "As it was trained"
        parts.append(f"<h3>{escaped(heading)}</h3>")
        for section in shown:
            title = f"{section.title}, {section.metric}" if section.metric else section.title
            content = f"{section_table(section)}{_list(section_notes(section))}"
            is_main = section.title == ENCODERS and section.metric == ACCURACY.name
            parts.append(folded(title, Markup(content), is_open=is_main and len(section.rows) <= OPEN_ROWS))
    return Markup("".join(parts))


def _other_tables(document: Document) -> Markup:
    """Tables of another command, and their plots."""
    parts = []
    for section in document.sections:
        title = "" if section.title == document.title else section.title
        shown = without_constants(section)
        content = Markup(f"{section_plot(section)}{section_table(shown)}{_list(_nameless(section_notes(shown)))}")
        parts.append(folded(title, content, is_open=len(section.rows) <= OPEN_ROWS) if title else content)
    return Markup("".join([*parts, _list(_nameless((*document.methods, *document.footnotes)))]))


def _nameless(lines: Iterable[str]) -> list[str]:
    """The lines without the folders of absolute paths."""
    return [shareable(line) for line in lines]


def _says_something(section: Section) -> bool:
    """Whether a number is in it: of one run, much cannot be computed."""
    return any(not isinstance(cell, NotComputed | str | None) for row in section.rows for cell in row)


def section_table(section: Section) -> Markup:
    """One table as HTML: intervals and p values in a quiet colour."""
    rows = []
    for row in section.rows:
        cells: list[str] = []
        for cell, column in zip(row, section.columns, strict=True):
            text = cell_text(cell, column)
            if isinstance(cell, Estimate):
                value, _, rest = text.partition(" ")
                cells.append(Markup(f"{escaped(value)} <span class='quiet'>{escaped(rest)}</span>"))
            else:
                cells.append(text)
        rows.append(cells)
    right = [index for index, column in enumerate(section.columns) if column.unit not in ("text", "flag")]
    return table([column_heading(column) for column in section.columns], rows, right=right)


def _list(lines: Sequence[str]) -> Markup:
    return Markup(f"<ul class='quiet'>{''.join(f'<li>{escaped(line)}</li>' for line in lines)}</ul>" if lines else "")


def random_encoders(subject: Subject) -> dict[str, str]:
    """Encoder -> label of its weights, where these are seeded and not trained."""
    labels = {encoder: str(facts.get("weights", "")) for encoder, facts in _encoders(subject)}
    return {encoder: label for encoder, label in labels.items() if label.startswith(RANDOM)}


def warnings(subject: Subject) -> list[str]:
    """What a reader has to know before any number."""
    found = []
    if random := random_encoders(subject):
        names = ", ".join(f"{encoder} ({label})" for encoder, label in random.items())
        found.append(f"Random encoders: says nothing about the real ones. Seeded, untrained weights: {names}.")
    return found


def provenance(subject: Subject) -> Markup:
    """Encoders, then a table of everything else."""
    rows, seen = [], set()
    for encoder, facts in _encoders(subject):
        identity = facts.get("identity", {})
        row = (
            encoder,
            str(facts.get("weights", "not recorded")),
            str(identity.get("weights_sha256", "not recorded"))[:12],
            str(identity.get("layer", "not recorded")),
            f"{identity.get('num_frames', '?')} by {identity.get('frame_rule', '?')}",
            " x ".join(map(str, identity.get("grid", ["not recorded"]))),
            str(identity.get("width", "")),
            str(identity.get("storage_dtype", "")),
            parity_words(facts.get("parity")),
        )
        rows += [] if row in seen else [row]
        seen.add(row)
    columns = (
        "encoder",
        "weights",
        "sha256 of weights",
        "output",
        "frames",
        "tokens T x H x W",
        "width",
        "stored as",
        "parity",
    )
    encoders = table(columns, rows, right=[6]) if rows else note("No encoders: text only.")
    return Markup(f"{encoders}{table(('', ''), _facts(subject).items())}")


def _encoders(subject: Subject) -> list[tuple[str, Mapping[str, Any]]]:
    """Of all runs, in the order of the sweep."""
    found = [(encoder, facts) for record in subject.records.values() for encoder, facts in record.encoders.items()]
    order = list(subject.results.encoders) if subject.results else []
    return sorted(found, key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def _facts(subject: Subject) -> dict[str, str]:
    records, configs, results = subject.records.values(), subject.configs.values(), subject.results
    about: dict[str, str] = {}
    if results:
        record, protocol = results.record, str(results.record["protocol"])
        about["protocol"] = f"{protocol}: {PROTOCOLS.get(protocol, 'as recorded')}"
        template = record.get("template")
        about["prompt"] = f"{template['name']}: {template['text']}" if isinstance(template, Mapping) else ""
        about["split"] = str(record["split"])
        about["questions digest"] = str(record.get("questions_digest", ""))
        about["samples digest"] = str(record.get("samples_digest", ""))
    stores = [str(results.record["store"])] if results and results.record.get("store") else []
    about["store"] = _distinct([*stores, *(r.store for r in records)][:1])
    about["snapshot"] = _distinct([str(results.record["snapshot"])] if results else [r.snapshot for r in records])
    if not subject.is_sweep:
        about["data digest"] = _distinct(r.data_digest for r in records)
    about["samples"] = _distinct(f"{r.num_samples:,}" for r in records)
    about["dropped samples"] = _distinct(_counts(r.dropped) for r in records)
    about["tokens"] = _distinct(r.tokens for r in records)
    about["LLM"] = _distinct(
        f"{c.llm}{' (it began with random weights)' if c.llm.startswith(FRESH) else ''}, trained: {c.train_llm}"
        for c in configs
    )
    about["projector"] = _distinct(f"{c.projector.resampler}, head {c.projector.head}" for c in configs)
    about["steps"] = _distinct(f"{r.num_steps:,}" for r in records)
    about["batch"] = _distinct(f"{c.batch_size} samples" for c in configs)
    about["precision"] = _distinct(c.precision for c in configs)
    about["started from"] = _distinct(r.started_from for r in records)
    about["software"] = _distinct(
        ", ".join(f"{name} {version}" for name, version in r.software.items()) for r in records
    )
    return {name: value for name, value in about.items() if value}


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def commands(subject: Subject) -> Markup:
    """Commands that make the same again, and the settings they name."""
    parts = []
    if subject.commands:
        parts.append(note("Stores and runs are shown by their names: put in where they are."))
        parts.append(f"<pre>{escaped(chr(10).join(subject.commands))}</pre>")
    else:
        held = f"{subject.path}/runs/*/config.yaml"
        parts.append(note(f"The record of the sweep has no axes; the settings of its runs are in {held}."))
    for name, text in subject.files.items():
        parts.append(f"<details><summary>{escaped(name)}</summary><pre>{escaped(text)}</pre></details>")
    return Markup("".join(parts))
