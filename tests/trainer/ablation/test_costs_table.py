"""Costs of a sweep's runs in its table: recomputed from their folders, and the control of as many visual tokens."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from featurestore import FeatureStore
from tests.trainer.ablation.conftest import entry, make_answer
from trainer.ablation.comparisons import token_matched
from trainer.ablation.costs import run_step_time, step_reading
from trainer.ablation.document import Estimate, NotComputed
from trainer.ablation.panel import ACCURACY, Study
from trainer.ablation.results import RETRAINED, read_results
from trainer.ablation.statistics import Resampling
from trainer.main import eval_main, train_main
from trainer.runs.load import load_run

SUBSETS = ("dinov2", "dinov2+vivit")


def answers(num_right):
    return [make_answer(index, right=index < num_right) for index in range(20)]


def controls(folder, tokens):
    """Rows by column; `tokens` are visual tokens by (fusion, tokens per frame, number of encoders)."""
    results = read_results(folder.path)
    videos = np.unique(results.questions.videos, return_inverse=True)[1]
    study = Study(results=results, resampling=Resampling(videos, draws=400, seed=0))
    panels = study.panels(RETRAINED, ACCURACY)
    by_place = {
        (setting, subset): tokens[setting.get("fusion"), setting.get("tokens_per_frame"), len(subset)]
        for setting, panel in panels.items()
        for subset in panel.keys
        if subset
    }
    section = token_matched(study, RETRAINED, ACCURACY, panels, by_place)
    return [dict(zip([column.name for column in section.columns], row, strict=True)) for row in section.rows]


def test_a_run_of_several_encoders_is_compared_with_one_of_as_many_tokens(new_sweep):
    folder = new_sweep()
    sequence = {"fusion": "concat_sequence"}
    right = {("a",): (10, 13), ("b",): (6, 8)}  # of 20 questions, at 4 and at 16 tokens per frame
    for subset, found in right.items():
        for grid, num_right in zip((4, 16), found, strict=True):
            folder.add(entry(subset, tokens_per_frame=grid, **sequence), answers(num_right))
    folder.add(entry(("a", "b"), tokens_per_frame=4, **sequence), answers(14))
    folder.add(entry(("a", "b"), tokens_per_frame=16), answers(12))
    tokens = {("concat_sequence", 4, 1): 4, ("concat_sequence", 16, 1): 16, ("concat_sequence", 4, 2): 16}
    rows = controls(folder, tokens | {("cross_attention", 16, 2): 16})
    by_control = {(row["setting"], row["control of as many tokens"]): row for row in rows}
    sequence_4 = "concat_sequence, 2d-average, 4 tokens per frame"
    sequence_16 = "concat_sequence, 2d-average, 16 tokens per frame"
    attention = "cross_attention, 2d-average, 16 tokens per frame"
    expected = {  # accuracy and that of the control
        (sequence_4, f"a ({sequence_16})"): (0.7, 0.65),
        (sequence_4, f"b ({sequence_16})"): (0.7, 0.4),
        (sequence_4, f"a+b ({attention})"): (0.7, 0.6),
        (attention, f"a ({sequence_16})"): (0.6, 0.65),
        (attention, f"b ({sequence_16})"): (0.6, 0.4),
        (attention, f"a+b ({sequence_4})"): (0.6, 0.7),
    }
    assert by_control.keys() == expected.keys()
    for place, (own, control) in expected.items():
        row = by_control[place]
        assert row["visual tokens"] == 16
        assert (row["accuracy"].value, row["accuracy of the control"].value) == pytest.approx((own, control))
        assert row["difference"].value == pytest.approx(own - control)
        assert row["difference"].p is not None


def test_a_control_that_no_run_is_says_what_adds_it(new_sweep):
    folder = new_sweep()
    for subset in (("a",), ("a", "b")):
        folder.add(entry(subset, fusion="concat_sequence"), answers(10))
    (row,) = controls(folder, {("concat_sequence", None, 1): 64, ("concat_sequence", None, 2): 128})
    assert isinstance(row["difference"], NotComputed)
    assert "128 visual tokens" in row["difference"].reason
    assert "--grids" in row["difference"].reason


@pytest.fixture
def sweep(question_store, config, tmp_path):
    """Two subsets with two seeds of a real sweep."""
    settings = tmp_path / "toy.yaml"
    settings.write_text(replace(config, max_steps=3, log_every=1).to_yaml())
    options = ["--from-cache", question_store, "--recipe", "demo", "--config", settings, "--out", tmp_path / "sweep"]
    call(train_main, "sweep", *options, "--subsets", ",".join(SUBSETS), "--seeds", "0,1")
    return tmp_path / "sweep"


def call(main, *words):
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.stdout


def section_of(document, title):
    section = next(s for s in document["sections"] if s["title"] == title)
    names = [column["name"] for column in section["columns"]]
    return [dict(zip(names, row, strict=True)) for row in section["rows"]]


@pytest.mark.slow
def test_every_row_has_the_costs_of_its_runs(sweep, question_store):
    document = json.loads(call(eval_main, "table", sweep, "--format", "json", "--draws", 200, "--ranks"))
    rows = {row["encoders"]: row for row in section_of(document, "Costs")}
    assert rows.keys() == {"text-only", *SUBSETS}
    assert (rows["text-only"]["visual tokens"], rows["text-only"]["read per step"]) == (0, None)
    for subset in SUBSETS:
        row, runs = rows[subset], sorted((sweep / "runs").glob(f"{subset}__*"))
        assert (len(runs), row["seeds"]) == (2, "0 1")
        model = load_run(runs[0]).built.model
        assert row["visual tokens"] == 8
        assert row["parameters"] == sum(value.numel() for value in model.parameters())
        assert row["FLOPs"] == 2 * row["MACs"] > 0
        assert row["step"] == pytest.approx(np.mean([run_step_time(run).seconds for run in runs]))
        reading = step_reading(runs[0])
        assert (row["read per step"], row["stored bytes per step"]) == (reading.array_bytes, reading.stored_bytes)
    ranks = section_of(document, "Effective rank")
    assert [(row["encoders"], row["encoder"]) for row in ranks] == [
        ("dinov2", "dinov2"),
        ("dinov2+vivit", "dinov2"),
        ("dinov2+vivit", "vivit"),
    ]
    ids = FeatureStore.open(question_store).clips["clip_id"].to_pylist()
    for row in ranks:
        tokens = FeatureStore.open(question_store).read(ids, encoder=row["encoder"])
        assert row["effective rank entering"] == pytest.approx(rank_by_svd(tokens.reshape(-1, tokens.shape[-1])))
        assert 1 < row["effective rank leaving"] <= row["channels entering"]


def rank_by_svd(tokens_PD):
    singular = np.linalg.svd(tokens_PD.astype(np.float64) - tokens_PD.mean(0, dtype=np.float64), compute_uv=False)
    share = singular / singular.sum()
    return np.exp(-(share * np.log(share)).sum())


@pytest.mark.slow
def test_costs_are_in_every_form_and_in_the_page_or_left_out(sweep, question_store, tmp_path):
    text = call(eval_main, "table", sweep, "--format", "csv", "--draws", 200)
    columns = {row["column"] for row in csv.DictReader(io.StringIO(text)) if row["table"] == "Costs"}
    assert {"visual tokens", "parameters", "MACs", "FLOPs", "step", "read per step"} <= columns
    assert "Token-matched control" in text
    assert "Effective rank" not in text
    assert "\\caption{Retrained" in call(eval_main, "table", sweep, "--format", "latex", "--draws", 200)
    call(eval_main, "report", sweep, "--out", tmp_path / "page.html", "--draws", 200, "--ranks")
    page = (tmp_path / "page.html").read_text()
    assert "<summary>Effective rank</summary>" in page
    assert "stored bytes per step" in page
    question_store.rename(tmp_path / "elsewhere")
    moved = json.loads(
        call(eval_main, "table", sweep, "--format", "json", "--draws", 200, "--store", tmp_path / "elsewhere")
    )
    assert not any("not_computed" in str(row) for row in section_of(moved, "Costs"))
    bare = call(eval_main, "table", sweep, "--no-costs", "--draws", 200, "--store", tmp_path / "elsewhere")
    assert "Costs" not in bare


def test_estimates_of_the_control_are_numbers(new_sweep):
    folder = new_sweep()
    for subset in (("a",), ("b",), ("a", "b")):
        folder.add(entry(subset), answers(10 + len(subset)))
    rows = controls(folder, {("cross_attention", None, 1): 64, ("cross_attention", None, 2): 64})
    assert [row["control of as many tokens"] for row in rows] == ["a", "b"]
    assert all(isinstance(row["difference"], Estimate) for row in rows)
