"""Every form of a small document, by hand."""

from __future__ import annotations

import csv
import io
import json

import pytest

from trainer.ablation.document import Column, Document, Section
from trainer.ablation.render import FORMATS, print_document

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
