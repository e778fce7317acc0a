"""Every form of a small document, by hand."""

from __future__ import annotations

import csv
import io
import json

import pytest

from trainer.ablation.document import Column, Document, Estimate, Section
from trainer.ablation.render import FORMATS, print_document, section_notes, without_constants

SECTION = Section(
    title="A small table",
    columns=(
        Column(name="run & name"),
        Column(name="value", unit="decimal"),
        Column(name="size", unit="size"),
        Column(name="TMACs", unit="tera"),
        Column(name="change", unit="change"),
        Column(name="steps", unit="count"),
    ),
    rows=(("a|b_c", 1.25, 4_194_304, 17_240_000_000_000, -0.031, 12_000), ('x,"y"', None, 768, 0, 0.5, 3)),
    notes=("50% of it.",),
)
DOCUMENT = Document(title="Small", sections=(SECTION,), footnotes=("Not counted: norms.",))


def written(form):
    return FORMATS[form][0](DOCUMENT)


def test_markdown_has_no_headings_of_blocks_where_there_are_none():
    assert written("markdown") == (
        "# Small\n\n\n### A small table\n\n"
        "| run \\& name | value | size | TMACs | change | steps |\n|---|---:|---:|---:|---:|---:|\n"
        "| a\\|b_c | 1.2 | 4.19 M | 17.24 | -3.1% | 12,000 |\n"
        '| x,"y" |  | 768 | 0.00 | +50.0% | 3 |\n\n'
        "- 50% of it.\n\n## Footnotes\n\n- Not counted: norms.\n"
    )


def test_csv_and_json_hold_the_values():
    rows = list(csv.DictReader(io.StringIO(written("csv"))))
    assert [row["value"] for row in rows if row["row"] == "run & name=a|b_c"] == [
        "1.25",
        "4194304",
        "17240000000000",
        "-0.031",
        "12000",
    ]
    assert [row["note"] for row in rows if row["note"]] == ["50% of it.", "Not counted: norms."]
    record = json.loads(written("json"))
    assert record["sections"][0]["rows"][1] == ['x,"y"', None, 768, 0, 0.5, 3]
    assert "questions" not in record


def test_latex():
    latex = written("latex")
    assert r"\caption{A small table.}" in latex
    assert r"a\textbar{}b\_c & 1.2 & 4.19 M & 17.24 & -3.1\% & 12,000 \\" in latex
    assert "% 50% of it." in latex


@pytest.mark.parametrize("form", ["text", *FORMATS])
def test_notes_are_printed_once(capsys, form):
    print_document(DOCUMENT, form)
    assert capsys.readouterr().out.count("50% of it.") == 1


def test_what_all_rows_share_is_a_note():
    names = ("setting", "encoders", "seeds", "reads")
    columns = (*(Column(name=name) for name in names), Column(name="x", unit="number"))
    rows = (("s", "a", "0 1", "mean", Estimate(value=1.0, seeds=(0, 1))), ("s", "b", "0", "mean", None))
    section = without_constants(Section(title="t", columns=columns, rows=rows, notes=("last",)))
    assert [column.name for column in section.columns] == ["encoders", "seeds", "x"]
    assert section.rows[1] == ("b", "0", None)
    assert section_notes(section) == ["Setting: s.", "Reads: mean.", "last"]
    shared = without_constants(Section(title="t", columns=columns, rows=rows[:1]))
    assert shared.rows == ((rows[0][1], rows[0][4]),)
    assert section_notes(shared).count("Seeds: 0 1.") == 1
