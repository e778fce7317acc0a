"""Every form of a small table, by hand."""

from __future__ import annotations

import json

import pytest

from trainer.ablation.rendering import Column, Table, print_tables, render

TABLE = Table(
    name="small",
    title="A small table",
    columns=[
        Column(key="name", heading="run & name", is_number=False),
        Column(key="value", heading="value", text="{:.1f}".format),
    ],
    rows=[{"name": "a|b_c", "value": 1.25, "more": 7}, {"name": 'x,"y"', "value": None, "more": 8}],
    notes=["50% of it."],
)


def test_markdown():
    assert render([TABLE], "markdown") == (
        '**A small table**\n\n| run & name | value |\n| --- | ---: |\n| a\\|b_c | 1.2 |\n| x,"y" | - |\n\n'
        "- 50% of it.\n"
    )


def test_csv_holds_the_values():
    assert render([TABLE, TABLE], "csv") == "\n".join(['name,value\na|b_c,1.25\n"x,""y""",\n'] * 2)


def test_latex():
    assert render([TABLE], "latex") == (
        "% A small table\n% 50% of it.\n\\begin{tabular}{lr}\n\\toprule\nrun \\& name & value \\\\\n\\midrule\n"
        'a|b\\_c & 1.2 \\\\\nx,"y" & - \\\\\n\\bottomrule\n\\end{tabular}\n'
    )


def test_json_holds_the_values_of_the_columns():
    rows = [{"name": "a|b_c", "value": 1.25}, {"name": 'x,"y"', "value": None}]
    assert json.loads(render([TABLE], "json")) == {
        "small": {"title": "A small table", "rows": rows, "notes": ["50% of it."]}
    }


@pytest.mark.parametrize(("form", "is_noted"), [("text", True), ("markdown", True), ("csv", False)])
def test_notes_are_printed_once_and_those_of_csv_apart(capsys, form, is_noted):
    print_tables([TABLE], form)
    out, err = capsys.readouterr()
    assert (out.count("50% of it."), err.count("50% of it.")) == (int(is_noted), int(not is_noted))
