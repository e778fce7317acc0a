"""The table of small sweeps, recomputed by hand."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from click.testing import CliRunner

from tests.trainer.ablation.conftest import all_subsets, entry, make_answer
from trainer.ablation.document import Estimate, NotComputed
from trainer.ablation.render import questions_to_latex, to_csv, to_json, to_latex, to_markdown
from trainer.ablation.results import read_results
from trainer.ablation.table import make_table
from trainer.main import eval_main

NUM_QUESTIONS = 20
# Right answers of 20 by subset: text-only .25, a .50, b .30, ab .60
RIGHT = {(): 5, ("a",): 10, ("b",): 6, ("a", "b"): 12}
MASKED = {(): 4, ("a",): 9, ("b",): 2, ("a", "b"): 12}


def answers(num_right: int, **changes):
    return [make_answer(index, right=index < num_right, **changes) for index in range(NUM_QUESTIONS)]


@pytest.fixture
def sweep(new_sweep):
    """Every subset with two seeds that agree, and the masks of the run of all encoders."""
    folder = new_sweep()
    for seed in (0, 1):
        for subset, num_right in RIGHT.items():
            name = folder.add(entry(subset, seed), answers(num_right))
        folder.mask(name, {"+".join(subset): answers(num_right) for subset, num_right in MASKED.items()})
    return folder


def table_of(folder, **options):
    return make_table(read_results(folder.path), draws=400, **options)


def rows_of(document, title, block="retrained", metric="accuracy"):
    """Rows as column -> cell."""
    section = next(
        (s for s in document.sections if (s.title, s.block, s.metric) == (title, block, metric)),
        None,
    )
    assert section is not None, f"{title} of {block}, {metric}"
    return [dict(zip([column.name for column in section.columns], row, strict=True)) for row in section.rows]


def values(rows, column):
    return [row[column].value for row in rows]


def test_retrained_capacity_necessity_shapley_and_interaction_by_hand(sweep):
    document = table_of(sweep)
    rows = rows_of(document, "Encoders")
    assert [row["encoder"] for row in rows] == ["a", "b"]
    assert values(rows, "Capacity") == pytest.approx([0.5, 0.3])
    assert values(rows, "Necessity") == pytest.approx([0.6 - 0.3, 0.6 - 0.5])
    # a: (.50 - .25 + .60 - .30) / 2, b: (.30 - .25 + .60 - .50) / 2
    assert values(rows, "Shapley value") == pytest.approx([0.275, 0.075])
    assert "CUR" not in rows[0]
    assert values(rows_of(document, "Pairwise interactions"), "Shapley interaction index") == pytest.approx([0.05])
    scores = rows_of(document, "Scores")
    assert values(scores, "accuracy") == pytest.approx([0.25, 0.5, 0.3, 0.6])
    assert [row["chance"] for row in scores] == [0.25] * 4
    assert [row["unreadable"] for row in scores] == [0.0] * 4


def test_masked_utilisation_and_gap_by_hand(sweep):
    document = table_of(sweep)
    rows = rows_of(document, "Encoders", "post-hoc")
    assert values(rows, "CUR") == pytest.approx([(0.6 - 0.1) / 0.6, (0.6 - 0.45) / 0.6])
    gap = rows_of(document, "Information Gap", "post-hoc")
    assert values(gap, "Information Gap") == pytest.approx([0.35 / 0.6])
    # a: (.45 - .20 + .60 - .10) / 2, b: (.10 - .20 + .60 - .45) / 2
    assert values(rows, "Shapley value") == pytest.approx([0.375, 0.025])
    assert "Capacity" not in rows[0]


def test_margins_are_a_metric_of_their_own(sweep):
    rows = rows_of(table_of(sweep), "Encoders", metric="log-likelihood margin")
    assert values(rows, "Capacity") == pytest.approx([0.0, -0.4])  # 10 of 20 at +1, the rest at -1
    masked = rows_of(table_of(sweep), "Encoders", "post-hoc", "log-likelihood margin")
    assert "CUR" not in masked[0]


def test_each_method_uses_its_own_text_only(sweep):
    """Retrained text-only is right in 5 of 20, masked in 4: no block borrows from another."""
    document = table_of(sweep)
    for block, empty in (("retrained", 0.25), ("post-hoc", 0.2)):
        rows = rows_of(document, "Encoders", block)
        assert sum(values(rows, "Shapley value")) == pytest.approx(0.6 - empty)
        assert values(rows_of(document, "Scores", block), "accuracy")[0] == pytest.approx(empty)


def test_ranks_of_the_methods_are_compared(sweep):
    (row,) = rows_of(table_of(sweep), "Agreement of the methods", block="")
    assert row["methods"] == "retrained and post-hoc"
    assert row["Spearman"].value == 1.0  # b < a < ab in both
    assert row["Spearman of single seeds"].value == 1.0
    assert row["Spearman between seeds of the first"].value == 1.0


def test_one_masked_seed_is_compared_with_the_retrained_runs_of_the_other_seeds(new_sweep):
    """Seeds 0 and 1 rank a, b, ab in opposite orders; the masks of seed 1 rank them as seed 0 does."""
    folder = new_sweep()
    order = dict(zip(all_subsets("ab")[1:], (2, 4, 6), strict=True))
    for seed in (0, 1):
        for subset, rank in order.items():
            name = folder.add(entry(subset, seed), answers(rank if seed == 0 else 8 - rank))
    folder.mask(name, {"+".join(subset): answers(rank) for subset, rank in order.items()})
    (row,) = rows_of(table_of(folder), "Agreement of the methods", block="")
    assert row["Spearman"].value == row["Kendall"].value == -1.0  # seed 1 is the common one
    assert row["Spearman of single seeds"].value == 1.0  # masks of seed 1 with retraining by seed 0
    assert row["Spearman between seeds of the first"].value == -1.0


def test_a_seed_that_lacks_runs_is_left_out_and_named(sweep):
    sweep.add(entry("a", seed=2), answers(20))
    document = table_of(sweep)
    rows = rows_of(document, "Encoders")
    assert values(rows, "Capacity") == pytest.approx([0.5, 0.3])  # of seeds 0 and 1; b has no seed 2
    assert rows[0]["Capacity"].seeds == (0, 1)
    section = next(s for s in document.sections if s.title == "Encoders")
    assert any("Capacity" in note and "of seed 0 1 only; seed 2 has no b" in note for note in section.notes)
    alone = next(row for row in rows_of(document, "Scores") if row["encoders"] == "a")
    assert (alone["seeds"], alone["accuracy"].value) == ("0 1 2", pytest.approx(2 / 3))


def test_a_missing_subset_stops_what_needs_it_and_nothing_else(new_sweep):
    folder = new_sweep()
    folder.add(entry(""), answers(5))
    folder.add(entry("a"), answers(10))
    missing = folder.add(entry("b"))
    folder.add(entry("ab"), answers(12))
    document = table_of(folder)
    rows = rows_of(document, "Encoders")
    assert rows[0]["Capacity"].value == 0.5
    assert rows[1]["Capacity"] == NotComputed("no answers of b (seed 0: it is not scored)")
    assert rows[0]["Necessity"] == rows[1]["Capacity"]  # all minus b
    assert rows[1]["Necessity"].value == pytest.approx(0.1)
    assert all(isinstance(row["Shapley value"], NotComputed) for row in rows)
    assert any(missing in line and "it is not scored" in line for line in document.missing)
    assert document.missing[-1].startswith("Next: merv-train sweep")
    assert "Necessity of a; Shapley value of a / b; Capacity of b: no answers of b (seed 0: it is" in to_markdown(
        document
    )


def test_no_text_only_run_means_no_shapley_value(new_sweep):
    folder = new_sweep()
    for subset in ("a", "b", "ab"):
        folder.add(entry(subset), answers(10))
    rows = rows_of(table_of(folder), "Encoders")
    assert rows[0]["Shapley value"] == NotComputed("no answers of text-only (no run of the sweep with these seeds)")


def test_equal_runs_differ_by_exactly_zero(new_sweep):
    folder = new_sweep()
    for subset in all_subsets("ab"):
        tied = [{**answer, "scores": [-1.0, -1.0, -1.0, -3.0]} for answer in answers(20)]  # credits of 1/3
        folder.add(entry(subset), tied)
    for metric in ("accuracy", "log-likelihood margin"):
        for row in rows_of(table_of(folder), "Encoders", metric=metric):
            cell = row["Necessity"]
            assert (cell.value, cell.low, cell.high, cell.p, cell.p_holm) == (0, 0, 0, 1, 1)


def test_holm_is_over_the_tests_of_a_block_and_metric(sweep):
    document = table_of(sweep)
    for block in ("retrained", "post-hoc"):
        for metric in ("accuracy", "log-likelihood margin"):
            cells = [
                cell
                for section in document.sections
                if (section.block, section.metric) == (block, metric)
                for row in section.rows
                for cell in row
                if isinstance(cell, Estimate) and cell.p is not None
            ]
            assert len(cells) == (3 if (block, metric) == ("post-hoc", "accuracy") else 2)  # drops, and the gap
            smallest = min(cells, key=lambda cell: cell.p)
            assert smallest.p_holm == pytest.approx(min(1, len(cells) * smallest.p))
            assert max(cells, key=lambda cell: cell.p).p_holm >= max(cell.p for cell in cells)


def test_settings_are_compared_along_one_axis_with_the_papers_as_reference(new_sweep):
    folder = new_sweep()
    folder.add(entry("ab", fusion="equal_mix"), answers(8))
    folder.add(entry("ab"), answers(12))
    folder.add(entry("ab", tokens_per_frame=1), answers(9))
    folder.add(entry("ab", tokens_per_frame=16), answers(7))
    folder.add(entry("ab", tokens_per_frame=64), answers(13))
    document = table_of(folder)
    fusions = {row["fusion"]: row for row in rows_of(document, "Fusion")}
    assert fusions["cross_attention"]["difference"] is None
    assert fusions["equal_mix"]["difference"].value == pytest.approx(0.4 - 0.6)
    grids = rows_of(document, "Tokens per frame")
    assert [row["tokens per frame"] for row in grids] == ["as stored", "1", "16", "64"]
    assert [row["on the Pareto front"] for row in grids] == [None, "yes", "no", "yes"]
    assert grids[1]["difference"].value == pytest.approx(0.45 - 0.65)
    assert any("importance of encoders is not computed" in note for note in document.footnotes)


def test_unreadable_answers_are_a_share_beside_chance(new_sweep):
    folder = new_sweep(protocol="letters")
    given = [{**answer, "scores": None} for answer in answers(10)]
    for answer in given[15:]:
        answer["predicted"] = None
    folder.add(entry("a"), given)
    folder.add(entry("b"), [{**answer, "scores": None} for answer in answers(10)])
    document = table_of(folder)
    shares = {row["encoders"]: row["unreadable"] for row in rows_of(document, "Scores")}
    assert shares == {"a": 0.25, "b": 0.0}
    assert {section.metric for section in document.sections} == {"accuracy"}
    assert "0 of them with log-likelihoods" in document.facts["sets of answers"]


MERV = ("languagebind", "dinov2", "vivit", "siglip")
JUDGE = {"version": "gpt-3.5-turbo-0613", "template": {"name": "video-chatgpt.txt", "sha256": "0"}}
OPEN_ROW = {"category": "all", "questions": 50, "normalised": 0.25, "judge_accuracy": 0.5, "judge_score": 2.5}


def as_published(new_sweep, *, source="NExTQA", template="merv-letters.txt", rule="linspace-32/2", **changes):
    """A sweep of one run that is scored as the paper's model is, but for the changes."""
    folder = new_sweep(MERV, protocol="letters")
    name = folder.add(
        entry(MERV, **{"tokens_per_frame": 64, **changes}),
        [{**answer, "scores": None} for answer in answers(12)],
        protocol="letters",
        template={"name": template, "text": "{question}"},
        benchmarks={source: {"scores": [{"category": "all", "questions": 20, "accuracy": 0.6}]}},
    )
    record = folder.path / "runs" / name / "run.json"
    record.write_text(record.read_text().replace("linspace-32/2", rule))
    return folder, name


def benchmark_rows(document):
    section = next((s for s in document.sections if s.title == "Scores by benchmark"), None)
    names = [column.name for column in section.columns] if section else []
    return [dict(zip(names, row, strict=True)) for row in section.rows] if section else []


def test_a_published_figure_of_equal_layout_and_conditions_stands_alongside(new_sweep):
    folder, _ = as_published(new_sweep)
    document = table_of(folder)
    (row,) = benchmark_rows(document)
    assert (row["benchmark"], row["scored by"], row["questions"]) == ("NExT-QA", "letters, prompt merv-letters", 20)
    assert (row["accuracy"], row["published"]) == pytest.approx((0.6, 0.6309))
    assert row["row of the paper"] == "MERV (frozen) (encoders)"
    assert not any("63.09" in note for note in document.footnotes)
    assert "0.6309" in to_csv(document)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"template": "letters.txt"}, "prompt merv-letters, here letters"),
        ({"rule": "linspace-16"}, "frames 32, here 16"),
        ({"source": "mine"}, "no scores on it"),
        ({"fusion": "equal_mix"}, "no run here has its encoders, fusion"),
        ({"projector": "3d-average"}, "no run here has its encoders, fusion"),
        ({"tokens_per_frame": 16}, "no run here has its encoders, fusion"),
    ],
)
def test_whatever_differs_makes_a_published_figure_a_footnote_that_names_it(new_sweep, changes, reason):
    folder, _ = as_published(new_sweep, **changes)
    document = table_of(folder)
    assert all("published" not in row for row in benchmark_rows(document))
    (note,) = [note for note in document.footnotes if "63.09" in note]
    assert "encoders on NExT-QA: MERV (frozen) 63.09" in note
    assert reason in note


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"judge": {**JUDGE, "version": "gpt-4o-mini-2024-07-18"}}, "judge gpt-3.5-turbo-0613, here gpt-4o-mini"),
        ({"judge": {**JUDGE, "template": {"name": "judge.txt"}}}, "prompt video-chatgpt, here judge"),
        ({"judge": None}, "judge gpt-3.5-turbo-0613, here none"),
        ({"limit": 50}, "no scores on it"),
        ({"step": 30}, "no scores on it"),
    ],
)
def test_open_ended_figures_stand_alongside_those_of_the_same_judge(new_sweep, changes, reason):
    folder, name = as_published(new_sweep)
    folder.score(name, file="open-ended/heldout-judge", **{"judge": JUDGE, "scores": {"MSVD": [OPEN_ROW]}, **changes})
    document = table_of(folder)
    rows = [row for row in benchmark_rows(document) if row["benchmark"] == "MSVD-QA"]
    notes = [note for note in document.footnotes if "MERV (frozen) 70.97" in note]
    if reason is None:  # the paper has this model twice, in the table of tokens per frame and in the main one
        assert [(row["published"], row["row of the paper"]) for row in rows] == [
            (pytest.approx(0.6908), "64 tokens per frame (tokens_per_frame)"),
            (pytest.approx(0.7097), "MERV (frozen) (encoders)"),
        ]
        assert {(row["accuracy"], row["judge's score"]) for row in rows} == {(0.5, 2.5)}
        assert not notes
    else:
        assert all(row["published"] is None for row in rows)
        assert reason in notes[0]


def test_averages_over_sets_that_are_not_published_are_footnotes(new_sweep):
    folder = new_sweep(MERV)
    for fusion in ("cross_attention", "equal_mix"):
        folder.add(entry(MERV, fusion=fusion), answers(12))
    (note,) = [note for note in table_of(folder).footnotes if "Cross-Attn" in note]
    assert "56.83" in note
    assert "54.19" in note
    assert "no scores on it" in note


def test_the_same_sweep_gives_the_same_table(sweep):
    assert to_json(table_of(sweep)) == to_json(table_of(sweep))
    assert to_json(table_of(sweep)) != to_json(table_of(sweep, seed=1))


def test_json_holds_every_number_and_every_question(sweep):
    record = json.loads(to_json(table_of(sweep)))
    section = next(s for s in record["sections"] if s["title"] == "Encoders" and s["block"] == "retrained")
    names = [column["name"] for column in section["columns"]]
    cell = section["rows"][0][names.index("Necessity")]
    assert cell["value"] == pytest.approx(0.3)
    assert cell["low"] <= 0.3 <= cell["high"]
    assert cell["seeds"] == [0, 1]
    assert len(record["questions"]["rows"]) == NUM_QUESTIONS
    assert len(record["questions"]["columns"]) == 4 + 8 + 8  # question, video, category, right; runs; masks


def test_csv_has_a_line_per_number(sweep):
    rows = list(csv.DictReader(io.StringIO(to_csv(table_of(sweep)))))
    (row,) = [
        row
        for row in rows
        if (row["block"], row["metric"], row["column"]) == ("post-hoc", "accuracy", "CUR") and "encoder=b" in row["row"]
    ]
    assert float(row["value"]) == pytest.approx(0.25)
    assert float(row["low"]) <= 0.25 <= float(row["high"])


HOSTILE = "50%_a&b|$x$ #1 {~^\\} <i>*"


def test_names_are_escaped(new_sweep):
    folder = new_sweep()
    folder.add(entry("a", note=HOSTILE), answers(10))
    folder.add(entry("b", note="two\nlines"), answers(10))
    document = table_of(folder)
    latex = to_latex(document)
    assert (
        r"50\%\_a\&b\textbar{}\$x\$ \#1 \{\textasciitilde{}\textasciicircum{}\textbackslash{}\} \textless{}i" in latex
    )
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == len(document.sections)
    markdown = to_markdown(document)
    assert r"note 50%\_a\&b\|\$x\$ \#1 {\~^\\} \<i\>\*" in markdown
    for heading, *lines in re.findall(r"(\|.*\|)\n\|(.*)\|\n((?:\|.*\n)+)", markdown):
        num_columns = {len(re.findall(r"(?<!\\)\|", line)) for line in [heading, *lines[1].splitlines()]}
        assert len(num_columns) == 1
    assert "two\\nlines" in latex.replace(r"\textbackslash{}", "\\")
    assert next(csv.DictReader(io.StringIO(to_csv(document))))["row"].startswith("setting=cross_attention, 2d-average")
    assert HOSTILE in to_csv(document)


def test_a_name_is_no_argument_of_a_latex_line_break(new_sweep):
    folder = new_sweep()
    given = answers(10)
    given[0]["sample_id"], given[1]["sample_id"] = "[2cm]", "*"
    folder.add(entry("a"), given)
    latex = questions_to_latex(table_of(folder))
    assert not re.search(r"\\\\\s*[\[*]", latex)
    assert "[2cm] & " in latex


@pytest.fixture
def invoke():
    def run(*arguments):
        return CliRunner().invoke(eval_main, ["table", *map(str, arguments)])

    return run


def test_the_command_prints_and_writes_every_format(sweep, tmp_path, invoke):
    result = invoke(sweep.path, "--draws", 100)
    assert result.exit_code == 0
    assert result.stdout.startswith("# Ablation sweep\n")
    for suffix, begin in {"md": "# Ablation", "csv": "block,metric", "tex": "% Ablation", "json": "{"}.items():
        out = tmp_path / f"table.{suffix}"
        result = invoke(sweep.path, "--draws", 100, "--out", out)
        assert (result.exit_code, result.stdout) == (0, "")
        assert out.read_text().startswith(begin)


def test_the_command_looks_up_questions(sweep, invoke):
    result = invoke(sweep.path, "--draws", 100, "--questions", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert len(rows) == NUM_QUESTIONS
    assert rows[11]["question"] == "q11"
    (column,) = [name for name in rows[0] if name.startswith("retrained: a+b") and name.endswith("seed0")]
    assert [float(row[column]) for row in rows] == [1.0] * 12 + [0.0] * 8


def test_an_incomplete_table_says_so_last_and_exits_with_3(sweep, invoke):
    sweep.add(entry("ab", seed=2))
    result = invoke(sweep.path, "--draws", 100)
    assert result.exit_code == 3
    assert result.stdout.startswith("# Ablation sweep\n")
    assert "merv-train sweep" in result.stderr.splitlines()[-1]


def test_the_command_reports_invalid_requests(sweep, tmp_path, invoke):
    result = invoke(tmp_path)
    assert result.exit_code == 1
    assert "it has no sweep.json" in result.stderr
    assert "--format" in invoke(sweep.path, "--out", tmp_path / "table.txt").stderr
    assert "no folder" in invoke(sweep.path, "--out", tmp_path / "none" / "table.md").stderr


def test_the_command_without_costs_loads_no_torch(sweep):
    import subprocess
    import sys

    code = (
        "import sys; from trainer.ablation.cli import table_command\n"
        f"table_command([{str(sweep.path)!r}, '--no-costs', '--draws', '100'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
