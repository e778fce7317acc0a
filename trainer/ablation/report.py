"""One self-contained HTML page about a sweep or a run: `merv-eval report`.

Scores with intervals, the lattice of subsets, question categories, learning curves, score against cost, every table,
where it all comes from, and the commands that make it again. No scripts, no links: it can be mailed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mervcache.errors import UserError
from mervcache.files import replace_text
from mervcache.page import Markup, cards, escaped, make_page, note, table
from trainer.ablation.document import Document, Estimate, NotComputed, Section
from trainer.ablation.figures import read_scores
from trainer.ablation.importance import ENCODERS
from trainer.ablation.panel import ACCURACY
from trainer.ablation.provenance import commands, provenance, warnings
from trainer.ablation.render import blocks, cell_text, column_heading, section_notes, without_constant_setting
from trainer.ablation.report_parts import (
    OPEN_ROWS,
    categories_part,
    costs_part,
    curves_part,
    folded,
    lattices_part,
    methods_of,
    scores_part,
)
from trainer.ablation.statistics import DRAWS
from trainer.ablation.subject import Subject, read_subject
from trainer.ablation.sweep import RETRAINED
from trainer.ablation.table import make_table


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
) -> Written:
    """Write the page of a sweep or a run, by default as NAME-report.html next to its folder."""
    subject = read_subject(path, split=split, protocol=protocol, store=store)
    document = make_table(subject.results, draws=draws, seed=seed) if subject.results else None
    target = out or subject.path.resolve().with_name(f"{subject.name}-report.html")
    try:
        replace_text(target, page(subject, document, text_tokens))
    except OSError as error:
        raise UserError(f"the page cannot be written to {target}: {error.strerror}; give another --out") from error
    return Written(path=target, missing=document.missing if document else ())


def page(subject: Subject, document: Document | None, text_tokens: int | None = None) -> str:
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
        parts.append(("Accuracy against cost", costs_part(subject, scores, text_tokens)))
        parts.append(("Tables", _tables(subject, document)))
    parts += [("Provenance", provenance(subject)), ("Make it again", commands(subject))]
    if document:
        parts += [("Methods", _list(document.methods)), ("Footnotes", _list(document.footnotes))]
    parts = [(title, content) for title, content in parts if content]
    links = "".join(f"<a href='#part{index}'>{escaped(title)}</a>" for index, (title, _) in enumerate(parts))
    body = "".join(f"<h2 id='part{i}'>{escaped(title)}</h2>\n{content}\n" for i, (title, content) in enumerate(parts))
    kind = "Ablation" if subject.is_sweep else "Run"
    notices = [*warnings(subject), *(f"Incomplete: {line}" for line in (document.missing if document else ()))]
    return make_page(
        title=f"{kind} {subject.name}",
        subtitle=_subtitle(subject),
        notices=notices,
        style=(files("trainer.ablation") / "report.css").read_text(),
        body=Markup(f"{cards(_cards(subject, document))}<nav>{links}</nav>{body}"),
    )


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
    whole = [s.estimate.value for s in scored if s.subset == results.encoders]
    if whole:
        found["best of all encoders" if len(whole) > 1 else "all encoders"] = f"{100 * max(whole):.1f} %"
    if none := [s.estimate.value for s in scored if not s.subset and results.encoders]:
        found["text only"] = f"{100 * max(none):.1f} %"
    found["chance"] = f"{100 * results.questions.chance:.1f} %"
    found["questions"] = f"{len(results.questions):,}"
    found["videos"] = f"{len(set(results.questions.videos)):,}"
    return found


def _tables(subject: Subject, document: Document) -> Markup:
    """Every table of `merv-eval table`."""
    parts = []
    for heading, sections in blocks(document):
        shown = [s for s in map(without_constant_setting, sections) if subject.is_sweep or _says_something(s)]
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
