"""A document as text, Markdown, CSV, LaTeX or JSON. Names come from files: each format escapes them in its own way."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from mervcache.console import format_bytes
from mervcache.errors import UserError
from trainer.ablation.document import TIME, Cell, Column, Document, Estimate, NotComputed, Plot, Section, Unit
from trainer.ablation.panel import seeds_text
from trainer.ablation.results import POST_HOC
from trainer.ablation.sweep import NESTED, ONE_SHOT, RETRAINED

HEADINGS = {
    RETRAINED: "Retrained: every subset is a run of its own",
    POST_HOC: "Post-hoc masked: encoders of a finished run are masked when it is scored",
    ONE_SHOT: "One-shot: one run was trained with random masks, and scored with each",
    NESTED: "One-shot, grids: one run was trained at a random grid in every step, and scored at each",
    "": "Methods compared",
    TIME: "Time",
}
SHARED = ("setting", "seeds", "probe", "reads")  # columns that are left out where all rows have one value
PERCENT = ("share", "points")  # units shown times 100
UNITS = {"share": "%", "points": "points", "nats": "nats/token"}
DECIMALS = {"share": 2, "points": 2, "nats": 4, "number": 4, "decimal": 1}
SIZES = (("T", 1e12), ("G", 1e9), ("M", 1e6))
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
MARKDOWN = re.compile(r"[\\`*\[\]<>|#~&$]|(?<!\w)_+|_+(?!\w)")  # underscores within a word mean nothing
CSV_COLUMNS = tuple("block metric table row column unit value low high p p_holm seeds note".split())


def to_markdown(document: Document) -> str:
    """Headings, pipe tables and lists."""
    lines = [f"# {_markdown(document.title)}", ""]
    lines += [f"- {name}: {_markdown(value)}" for name, value in document.facts.items() if value]
    if document.missing:
        lines += ["", "**Incomplete:**", "", *(f"- {_markdown(line)}" for line in document.missing)]
    for heading, sections in blocks(document):
        lines += ["", f"## {heading}"] if heading else []
        for section in map(without_constants, sections):
            lines += ["", f"### {_heading(section, _markdown)}", "", *_pipe_table(section)]
            notes = [f"- {_markdown(note)}" for note in section_notes(section)]
            lines += ["", *notes] if notes else []
    if document.methods:
        lines += ["", "## Methods", "", *(f"- {_markdown(line)}" for line in document.methods)]
    if document.footnotes:
        lines += ["", "## Footnotes", "", *(f"- {_markdown(line)}" for line in document.footnotes)]
    return "\n".join(lines) + "\n"


def _questions(document: Document) -> Section:
    assert document.questions is not None
    return document.questions


def questions_to_markdown(document: Document) -> str:
    """The question x run table."""
    section = _questions(document)
    return "\n".join([f"# {_markdown(section.title)}", "", *_pipe_table(section)]) + "\n"


def to_latex(document: Document) -> str:
    """One `table` per section, for `\\usepackage{booktabs}`; facts and notes are comments and captions."""
    parts = [f"% {_comment(document.title)}; needs \\usepackage{{booktabs}}"]
    parts += [f"% {name}: {_comment(value)}" for name, value in document.facts.items() if value]
    parts += [f"% INCOMPLETE: {_comment(line)}" for line in document.missing]
    parts += [f"% {_comment(line)}" for line in (*document.methods, *document.footnotes)]
    for heading, sections in blocks(document):
        parts += ["", f"% {heading}"] if heading else []
        for section in map(without_constants, sections):
            parts.append(_latex_table(section, f"{f'{heading}. ' if heading else ''}{_heading(section, _latex)}."))
    return "\n".join(parts) + "\n"


def questions_to_latex(document: Document) -> str:
    """The question x run table."""
    section = _questions(document)
    return _latex_table(section, section.title) + "\n"


def to_csv(document: Document) -> str:
    """One line per number, of all tables: shares and points as fractions of 1; then lines of what is missing."""
    rows: list[Sequence[Any]] = []
    for section in document.sections:
        labels = [index for index, column in enumerate(section.columns) if column.unit == "text"]
        for row in section.rows:
            label = "; ".join(f"{section.columns[index].name}={row[index]}" for index in labels if row[index] != "")
            head = (section.block, section.metric, section.title, label)
            for column, cell in zip(section.columns, row, strict=True):
                if column.unit != "text" and cell is not None:
                    rows.append((*head, column.name, column.unit, *_csv_values(cell)))
        rows += [(section.block, section.metric, section.title, *[""] * 9, note) for note in section.notes]
    rows += [("", "", "incomplete", *[""] * 9, line) for line in document.missing]
    rows += [("", "", "footnote", *[""] * 9, line) for line in document.footnotes]
    return _csv_text(CSV_COLUMNS, rows)


def questions_to_csv(document: Document) -> str:
    """The question x run table."""
    section = _questions(document)
    return _csv_text([column.name for column in section.columns], section.rows)


def to_json(document: Document) -> str:
    """Everything, the question x run table included: shares and points as fractions of 1."""
    record = {
        "format": 1,
        "title": document.title,
        "facts": document.facts,
        "missing": document.missing,
        "sections": [_json_section(section) for section in document.sections],
        "methods": document.methods,
        "footnotes": document.footnotes,
        **({"questions": _json_section(document.questions)} if document.questions else {}),
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def questions_to_json(document: Document) -> str:
    """The question x run table."""
    return json.dumps({"format": 1, **_json_section(_questions(document))}, indent=1, allow_nan=False) + "\n"


def read_json(path: Path) -> Document:
    """A document that a command wrote as JSON; UserError for a file that is none."""
    try:
        record = json.loads(path.read_text())
        if record["format"] != 1:
            raise ValueError(f"its format is {record['format']!r}, this version reads 1")
        return Document(
            title=str(record["title"]),
            facts={str(name): str(value) for name, value in record["facts"].items()},
            sections=tuple(map(_section_of_json, record["sections"])),
            missing=tuple(map(str, record["missing"])),
            methods=tuple(map(str, record["methods"])),
            footnotes=tuple(map(str, record["footnotes"])),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"entry {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path} holds no tables ({reason}); give a file that merv-eval probe, rank, flops or table has written as"
            " JSON with --out or --format json"
        ) from error


def _section_of_json(record: Mapping[str, Any]) -> Section:
    columns = tuple(Column(name=str(column["name"]), unit=column["unit"]) for column in record["columns"])
    if unknown := [column.unit for column in columns if column.unit not in get_args(Unit)]:
        raise ValueError(f"unit {unknown[0]!r} of a column is unknown")
    rows = tuple(tuple(map(_cell_of_json, row)) for row in record["rows"])
    if any(len(row) != len(columns) for row in rows):
        raise ValueError("a row has another number of cells than the table has columns")
    plot = record.get("plot") and Plot(**{**record["plot"], "lines": tuple(record["plot"]["lines"])})
    names = {column.name for column in columns}
    if plot and not {plot.x, plot.y, *plot.lines} <= names:
        raise ValueError("a plot names columns that its table has not")
    texts = {name: str(record[name]) for name in ("title", "block", "metric")}
    return Section(columns=columns, rows=rows, notes=tuple(map(str, record["notes"])), plot=plot, **texts)


def _cell_of_json(value: Any) -> Cell:
    if isinstance(value, Mapping):
        if "not_computed" in value:
            return NotComputed(str(value["not_computed"]))
        numbers = {name: value[name] for name in ("value", "low", "high", "p", "p_holm")}
        if not all(number is None or isinstance(number, int | float) for number in numbers.values()):
            raise ValueError(f"a cell holds {value}")
        return Estimate(**numbers, seeds=tuple(value["seeds"]))
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"a cell holds {value!r}")
    return value


FORMATS: dict[str, tuple[Callable[[Document], str], Callable[[Document], str]]] = {
    "markdown": (to_markdown, questions_to_markdown),
    "csv": (to_csv, questions_to_csv),
    "latex": (to_latex, questions_to_latex),
    "json": (to_json, questions_to_json),
}


def print_document(document: Document, format_: str) -> None:
    """Print it on stdout, in one of FORMATS or, as "text", as tables for a terminal."""
    from mervcache.console import table  # rich

    if format_ != "text":
        print(FORMATS[format_][0](document), end="", flush=True)
        return
    for index, section in enumerate(document.sections):
        print(f"\n{section.title}" if index else section.title)
        headings = [column_heading(column) for column in section.columns]
        right = [name for name, column in zip(headings, section.columns, strict=True) if column.unit != "text"]
        cells = (
            [cell_text(cell, column) for cell, column in zip(row, section.columns, strict=True)] for row in section.rows
        )
        table(headings, cells, right=right)
        for note in section_notes(section):
            print(f"- {_one_line(note)}")
    for line in (*document.methods, *document.footnotes):
        print(f"- {_one_line(line)}")


def blocks(document: Document) -> list[tuple[str, list[Section]]]:
    """Sections by the heading of their block, those of no block last; without a heading where there are no blocks."""
    found = [(block, [section for section in document.sections if section.block == block]) for block in HEADINGS]
    has_blocks = any(section.block for section in document.sections)
    return [(HEADINGS[block] if has_blocks else "", sections) for block, sections in found if sections]


def without_constants(section: Section) -> Section:
    """What all rows share is a note, not a column: their setting, seeds, kind of probe."""
    notes, kept = [], []
    for index, column in enumerate(section.columns):
        values = {row[index] for row in section.rows}
        if column.name in SHARED and len(values) == 1:
            notes += [f"{column.name.capitalize()}: {value}." for value in values if value]
        else:
            kept.append(index)
    return replace(
        section,
        columns=tuple(section.columns[index] for index in kept),
        rows=tuple(tuple(row[index] for index in kept) for row in section.rows),
        notes=(*notes, *section.notes),
    )


def _heading(section: Section, escape: Callable[[str], str]) -> str:
    return escape(f"{section.title}, {section.metric}" if section.metric else section.title)


def column_heading(column: Column) -> str:
    return f"{column.name} ({UNITS[column.unit]})" if column.unit in UNITS else column.name


def cell_text(cell: Cell, column: Column) -> str:
    """A cell as a person reads it."""
    if cell is None:
        return ""
    if isinstance(cell, NotComputed):
        return "–"
    if column.unit in ("text", "flag") or isinstance(cell, str):
        return str(cell)
    if column.unit == "count":
        return f"{cell:,}"
    if column.unit == "change":
        return f"{cell:+.1%}"
    if column.unit == "seconds":
        return f"{cell:.3g} s"
    if not isinstance(cell, Estimate):
        if column.unit == "tera":
            return f"{cell / 1e12:.2f}"
        if column.unit == "bytes":
            return format_bytes(cell)
        if column.unit == "size":
            return next((f"{cell / scale:.2f} {name}" for name, scale in SIZES if cell >= scale), f"{cell:,}")
    scale = 100 if column.unit in PERCENT else 1

    def number(value: float) -> str:
        return f"{value * scale + 0.0:.{DECIMALS[column.unit]}f}"

    if not isinstance(cell, Estimate):
        return number(float(cell))
    text = number(cell.value)
    if cell.low is not None and cell.high is not None:
        text += f" [{number(cell.low)}, {number(cell.high)}]"
    p = cell.p if cell.p_holm is None else cell.p_holm
    if p is not None:
        text += f", p {p:.2g}" if p >= 0.001 else ", p < 0.001"
    return text


def section_notes(section: Section) -> list[str]:
    """What a reader of the section has to know: seeds, what is not computed, and its notes."""
    notes = []
    has_seeds = any(column.name == "seeds" for column in section.columns)
    if not has_seeds and not any(note.startswith("Seeds: ") for note in section.notes):
        by_seeds: dict[tuple[int, ...], list[str]] = {}
        for index, column in enumerate(section.columns):
            cells = (row[index] for row in section.rows)
            for seeds in {cell.seeds for cell in cells if isinstance(cell, Estimate)} - {()}:
                by_seeds.setdefault(seeds, []).append(column.name)
        for seeds, names in by_seeds.items():
            columns = f" ({', '.join(names)})" if len(by_seeds) > 1 else ""
            notes.append(f"Seeds{columns}: {seeds_text(seeds)}.")
    notes += [f"Not computed: {what}: {reason}." for reason, what in section.not_computed.items()]
    return [*notes, *section.notes]


def _pipe_table(section: Section) -> Iterable[str]:
    columns = section.columns
    yield "| " + " | ".join(_markdown(column_heading(column)) for column in columns) + " |"
    yield "|" + "|".join("---" if column.unit == "text" else "---:" for column in columns) + "|"
    for row in section.rows:
        pairs = zip(row, columns, strict=True)
        cells = (_markdown(cell) if isinstance(cell, str) else cell_text(cell, column) for cell, column in pairs)
        yield "| " + " | ".join(cells) + " |"


def _latex_table(section: Section, caption: str) -> str:
    columns = section.columns
    rows = [
        [_latex(cell_text(cell, column)) for cell, column in zip(row, columns, strict=True)] for row in section.rows
    ]
    notes = "".join(f"\n% {_comment(note)}" for note in section_notes(section))
    layout = "".join("l" if column.unit == "text" else "r" for column in columns)
    return "\n".join(
        [
            f"{notes}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{{layout}}}",
            r"\toprule",
            " & ".join(_latex(column_heading(column)) for column in columns) + r" \\",
            r"\midrule",
            *("{}" * row[0].startswith(("[", "*")) + " & ".join(row) + r" \\" for row in rows),  # no argument of \\
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _csv_values(cell: Cell) -> tuple[Any, ...]:
    """Value, low, high, p, p_holm, seeds, note."""
    if isinstance(cell, Estimate):
        return (cell.value, cell.low, cell.high, cell.p, cell.p_holm, seeds_text(cell.seeds), "")
    if isinstance(cell, NotComputed):
        return (None, None, None, None, None, "", f"not computed: {cell.reason}")
    return (cell, None, None, None, None, "", "")


def _csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()


def _json_section(section: Section) -> dict[str, Any]:
    def plain(cell: Cell) -> Any:
        if isinstance(cell, Estimate):
            return asdict(cell)
        return {"not_computed": cell.reason} if isinstance(cell, NotComputed) else cell

    return {
        "title": section.title,
        "block": section.block,
        "metric": section.metric,
        "columns": [asdict(column) for column in section.columns],
        "rows": [[plain(cell) for cell in row] for row in section.rows],
        "notes": section.notes,
        **({"plot": asdict(section.plot)} if section.plot else {}),
    }


def _one_line(text: str) -> str:
    """Control characters escaped: a name cannot end its line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _markdown(text: str) -> str:
    return MARKDOWN.sub(lambda found: "".join(f"\\{character}" for character in found[0]), _one_line(text))


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in _one_line(text)).replace("–", "--")


def _comment(text: str) -> str:
    return _one_line(text)
