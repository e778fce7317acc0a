"""Which runs a sweep has, what pins them, and that each is the run that merv-train would have made."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from featurestore import FeatureStore
from mervcache.errors import UserError
from trainer.ablation.execute import open_sweep, run_sweep
from trainer.ablation.results import read_results
from trainer.ablation.sweep import (
    SweepConfig,
    add_to_record,
    expand_subsets,
    plan_runs,
    read_sweep,
    resume_command,
    run_folder,
)
from trainer.ablation.table import make_table
from trainer.config import read_config
from trainer.loop.stages import train_in_stages
from trainer.main import train_main
from trainer.recipes import Stage, get_stages
from trainer.runs.run_record import read_metrics, read_scores

pytestmark = pytest.mark.slow

FOUR = ("languagebind", "dinov2", "vivit", "siglip")


@pytest.fixture
def stages(config):
    return (Stage(name="finetune", config=replace(config, max_steps=3)),)


def test_all_subsets_of_four_encoders_are_fifteen_by_size_in_the_order_of_the_encoders():
    found = expand_subsets(["all"], FOUR)
    assert len(found) == 15
    assert found[:5] == [("languagebind",), ("dinov2",), ("vivit",), ("siglip",), ("languagebind", "dinov2")]
    assert found[-1] == FOUR


def test_rules_and_lists_add_up_without_repeats():
    assert expand_subsets(["leave-one-out", "alone"], ["a", "b"]) == [("a",), ("b",), ("a", "b")]
    assert expand_subsets(["siglip+languagebind"], FOUR) == [("languagebind", "siglip")]
    with pytest.raises(UserError, match=r"unknown subset or encoder .*'siglop', the nearest known one is 'siglip'"):
        expand_subsets(["siglop"], FOUR)


@given(
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    grids=st.lists(st.sampled_from([1, 4, 16, 64]), max_size=3, unique=True),
    fusions=st.lists(st.sampled_from(["cross_attention", "concat_sequence", "equal_mix"]), max_size=3, unique=True),
)
def test_a_sweep_has_every_combination_once_under_a_name_of_its_own(seeds, grids, fusions):
    sweep = SweepConfig(seeds=tuple(seeds), grids=tuple(grids), fusions=tuple(fusions))
    runs = plan_runs(sweep, get_stages("demo"), encoders=FOUR, snapshot="s", time_steps=16)
    subsets = expand_subsets(["all"], FOUR)
    expected = set(itertools.product(subsets, fusions or ["cross_attention"], grids or [16], seeds))  # the demo's 4 x 4
    found = {(run.encoders, run.fusion, run.tokens_per_frame, run.seed) for run in runs if run.encoders}
    assert found == expected
    assert len({run.name for run in runs}) == len(runs) == len(expected) + len(seeds)
    for run in runs:
        config = run.stages[-1].config
        assert (config.clips_with, config.snapshot, config.seed) == (FOUR, "s", run.seed)
        if run.tokens_per_frame:
            assert config.projector.grid[1] * config.projector.grid[2] == run.tokens_per_frame


def test_a_fusion_of_one_encoder_makes_runs_of_single_encoders_only():
    sweep = SweepConfig(fusions=("first",), text_only=False)
    runs = plan_runs(sweep, get_stages("demo"), encoders=FOUR, snapshot="s", time_steps=16)
    assert [run.encoders for run in runs] == [(encoder,) for encoder in FOUR]


def test_rates_scale_every_learning_rate():
    sweep = SweepConfig(rates=(0.5, 1.0), subsets=("alone",), text_only=False)
    half, whole = plan_runs(sweep, get_stages("demo"), encoders=("dinov2",), snapshot="s", time_steps=16)
    before, after = whole.stages[0].config.optimizer, half.stages[0].config.optimizer
    assert (before.projector_lr, before.lora_lr) == (2e-3, 2e-4)
    assert (after.projector_lr, after.fusion_lr, after.lora_lr) == (1e-3, 1e-3, 1e-4)
    assert after.warmup_ratio == before.warmup_ratio


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"grids": (8,)}, "squares such as 1, 4, 16, 64; got 8"),
        ({"fusions": ("cross-attention",)}, "the nearest known one is 'cross_attention'"),
        ({"seeds": (1, 1)}, "seeds names a value twice"),
        ({"rates": (0.0,)}, "above 0"),
        ({"seeds": ()}, "at least one seed"),
    ],
)
def test_axes_that_make_no_sense_are_refused(axes, message):
    with pytest.raises(UserError, match=message):
        SweepConfig(**axes)


def test_every_run_reads_the_same_samples_and_answers_the_same_questions(make_question_store, stages, tmp_path):
    failed = [("vivit", "set/clip3.mp4"), ("vivit", "set/clip19.mp4")]  # one to train on, one to ask about
    store = make_question_store(tmp_path / "gaps.zarr", failed=failed)
    sweep = open_sweep(SweepConfig(), stages, str(store), tmp_path / "sweep")
    outcomes = run_sweep(sweep)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 4  # text only, two alone, both
    folders = [run_folder(tmp_path / "sweep", run) for run in sweep.runs]
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    answers = [[answer["sample_id"] for answer in read_scores(folder)[0]["answers"]] for folder in folders]
    # No run may see a clip that vivit has no tokens of, not even the run of dinov2 alone.
    assert {record["num_samples"] for record in records} == {len(sweep.samples)} == {17}
    assert answers == [["s018", "s020"]] * 4
    assert {record["snapshot"] for record in records} == {FeatureStore.open(store).snapshot}


def test_a_run_of_a_sweep_is_the_run_that_its_settings_make_elsewhere(question_store, stages, tmp_path):
    sweep = open_sweep(SweepConfig(subsets=("alone",)), stages, str(question_store), tmp_path / "sweep")
    run_sweep(sweep)
    run = sweep.runs[-1]
    train_in_stages(run.stages, str(question_store), tmp_path / "elsewhere")
    [here], [there] = (
        sorted(f.glob("checkpoints/*/model.safetensors"))[-1:]
        for f in (run_folder(sweep.out, run), tmp_path / "elsewhere")
    )
    assert here.read_bytes() == there.read_bytes()


def test_finished_runs_are_left_alone_and_combinations_added_later(question_store, stages, tmp_path):
    out = tmp_path / "sweep"
    first = open_sweep(SweepConfig(subsets=("alone",), text_only=False), stages, str(question_store), out)
    run_sweep(first)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("runs/**/*") if path.is_file()}
    more = open_sweep(SweepConfig(seeds=(0, 1), text_only=False), stages, str(question_store), out)
    outcomes = run_sweep(more)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert set(read_sweep(out)["runs"]) == {run.name for run in more.runs}


def test_a_sweep_is_begun_with_one_set_of_settings(question_store, stages, tmp_path):
    run_sweep(open_sweep(SweepConfig(subsets=("alone",)), stages, str(question_store), tmp_path / "sweep"))
    other = (replace(stages[0], config=replace(stages[0].config, batch_size=3)),)
    with pytest.raises(UserError, match=r"begun with other values.*batch_size was 6, is 3"):
        run_sweep(open_sweep(SweepConfig(subsets=("alone",)), other, str(question_store), tmp_path / "sweep"))


def test_a_frozen_llm_without_visual_tokens_is_scored_as_it_is(question_store, stages, pretrained, tmp_path):
    frozen = (replace(stages[0], config=replace(stages[0].config, llm=pretrained, train_llm="none")),)
    sweep = open_sweep(SweepConfig(subsets=("alone",)), frozen, str(question_store), tmp_path / "sweep")
    outcomes = {outcome.name: outcome for outcome in run_sweep(sweep)}
    assert {outcome.status for outcome in outcomes.values()} == {"finished"}
    assert not (run_folder(sweep.out, "text-only__seed0") / "config.yaml").exists()
    assert outcomes["text-only__seed0"].questions == len(sweep.questions)


def test_validation_on_the_questions_that_score_the_runs_is_refused(question_store, stages, tmp_path):
    validated = (replace(stages[0], config=replace(stages[0].config, eval_every=1)),)
    with pytest.raises(UserError, match="validated on split 'heldout', which scores them"):
        open_sweep(SweepConfig(), validated, str(question_store), tmp_path / "sweep")


def test_a_run_that_fails_is_named_and_the_others_go_on(question_store, stages, tmp_path):
    sweep = open_sweep(
        SweepConfig(subsets=("alone",), text_only=False), stages, str(question_store), tmp_path / "sweep"
    )
    blocked = run_folder(sweep.out, sweep.runs[0])
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the run's folder should be")
    outcomes = run_sweep(sweep)
    assert [outcome.status for outcome in outcomes] == ["failed", "finished"]
    assert outcomes[0].error
    blocked.unlink()
    assert [outcome.status for outcome in run_sweep(sweep)] == ["finished", "finished"]


def test_loss_of_a_killed_sweep_is_that_of_one_that_was_not(question_store, stages, tmp_path):
    """What `merv-train --resume auto` promises of a run holds for the runs of a sweep."""
    whole = open_sweep(
        SweepConfig(subsets=("alone",), text_only=False), stages, str(question_store), tmp_path / "whole"
    )
    run_sweep(whole)
    cut = open_sweep(SweepConfig(subsets=("alone",), text_only=False), stages, str(question_store), tmp_path / "cut")
    from trainer.loop.train import train
    from trainer.sources import open_store

    config = cut.runs[0].stages[0].config
    samples, source = open_store(str(question_store), config)
    train(config, samples, source, run_folder(cut.out, cut.runs[0]), store=str(question_store), stop_at=2, quiet=True)
    run_sweep(cut)
    for run in whole.runs:
        losses = [[row["loss"] for row in read_metrics(run_folder(s.out, run))] for s in (whole, cut)]
        assert losses[0] == losses[1]


def test_the_command_prints_the_runs_and_its_settings(question_store, tmp_path):
    runner = CliRunner()
    (tmp_path / "base.yaml").write_text("projector: {grid: [4, 2, 2]}\n")
    common = ["sweep", "--from-cache", str(question_store), "--recipe", "demo", "--seeds", "0,1", "--grids", "4"]
    dry = runner.invoke(
        train_main,
        [
            *common,
            "--subsets",
            "alone",
            "--config",
            str(tmp_path / "base.yaml"),
            "--dry-run",
            "--json",
            "--out",
            str(tmp_path / "s"),
        ],
    )
    assert dry.exit_code == 0, dry.output
    assert len(json.loads(dry.stdout)["runs"]) == 6
    assert not (tmp_path / "s").exists()
    printed = runner.invoke(train_main, [*common, "--print-config"])
    (tmp_path / "sweep.yaml").write_text(printed.stdout)
    again = runner.invoke(train_main, ["sweep", "--config", str(tmp_path / "sweep.yaml"), "--print-config"])
    assert again.stdout == printed.stdout


def test_the_folder_alone_repeats_all_axes_and_settings_that_were_recorded(question_store, tmp_path):
    out = tmp_path / "sweep"
    common = ["sweep", "--from-cache", str(question_store), "--out", str(out), "--recipe", "demo", "--max-steps", "1"]
    (tmp_path / "base.yaml").write_text("{llm: 'fresh:mini', batch_size: 3, projector: {grid: [4, 2, 2]}}\n")
    common += ["--config", str(tmp_path / "base.yaml"), "--no-text-only", "--json"]
    runner = CliRunner()
    first = runner.invoke(train_main, [*common, "--subsets", "dinov2", "--seeds", "0,1"])
    assert first.exit_code == 0, first.output
    second = runner.invoke(train_main, [*common, "--subsets", "vivit", "--fusions", "equal_mix"])
    names = [run["name"] for result in (first, second) for run in json.loads(result.stdout)["runs"]]
    shutil.rmtree(out / "runs")
    assert resume_command(out) == f"merv-train sweep --out {out}"
    again = runner.invoke(train_main, ["sweep", "--out", str(out), "--json"])
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)["runs"]
    assert sorted(run["name"] for run in found) == sorted(names)
    assert {run["status"] for run in found} == {"finished"}
    config = read_config(out / "runs" / "vivit__equal_mix__2d-average__4__seed0")
    assert (config.batch_size, config.llm, config.projector.standardise) == (3, "fresh:mini", True)
    printed = runner.invoke(train_main, ["sweep", "--out", str(out), "--print-config"]).stdout
    assert [part["sweep"]["subsets"] for part in yaml.safe_load_all(printed)] == [["dinov2"], ["vivit"]]


def test_a_sweep_goes_on_where_its_store_is_now(make_question_store, stages, tmp_path):
    """Half a run was trained in the old place; clips that one encoder lacks stay left out in the new one."""
    from trainer.loop.train import train
    from trainer.sources import open_store

    axes, failed = SweepConfig(subsets=("alone",)), [("vivit", "set/clip3.mp4"), ("vivit", "set/clip19.mp4")]
    store = make_question_store(tmp_path / "old.zarr", failed=failed)
    whole = open_sweep(axes, stages, str(store), tmp_path / "whole")
    run_sweep(whole)
    cut = open_sweep(axes, stages, str(store), tmp_path / "cut")
    half = next(run for run in cut.runs if run.encoders)
    config = half.stages[0].config
    samples, source = open_store(str(store), config)
    train(config, samples, source, run_folder(cut.out, half), store=str(store), stop_at=2, quiet=True)
    add_to_record(cut.out, cut.pins, cut.axes, cut.runs, store=str(store))
    moved = store.rename(tmp_path / "new.zarr")
    runner = CliRunner()
    lost = runner.invoke(train_main, ["sweep", "--out", str(cut.out)])
    assert lost.exit_code == 1
    assert "--from-cache STORE" in lost.output
    found = runner.invoke(train_main, ["sweep", "--out", str(cut.out), "--from-cache", str(moved), "--json"])
    assert found.exit_code == 0, found.output
    assert {run["status"] for run in json.loads(found.stdout)["runs"]} == {"finished"}
    for run in whole.runs:
        scores = [read_scores(run_folder(sweep.out, run))[0] for sweep in (whole, cut)]
        assert scores[0]["answers"] == scores[1]["answers"]
    assert read_sweep(cut.out)["store"] == str(moved)
    assert runner.invoke(train_main, ["sweep", "--out", str(cut.out)]).exit_code == 0  # nothing is left to do


def test_another_store_does_not_take_the_place_of_the_sweeps_own(make_question_store, stages, tmp_path):
    store, out = make_question_store(tmp_path / "one.zarr"), tmp_path / "sweep"
    sweep = open_sweep(SweepConfig(), stages, str(store), out)
    add_to_record(out, sweep.pins, sweep.axes, sweep.runs, store=str(store))
    other = make_question_store(tmp_path / "other.zarr", indices=range(1, 21))
    with pytest.raises(UserError, match=rf"begun with snapshot {sweep.pins['snapshot']} .*another --out"):
        open_sweep(SweepConfig(), stages, str(other), out)


def test_another_grid_of_the_settings_is_another_run(question_store, stages, tmp_path):
    def names(grid):
        projector = replace(stages[0].config.projector, grid=grid)
        changed = (replace(stages[0], config=replace(stages[0].config, projector=projector)),)
        return {
            run.name for run in open_sweep(SweepConfig(subsets=("alone",)), changed, str(question_store), tmp_path).runs
        }

    one, other = names((4, 2, 2)), names((4, 1, 1))
    assert one & other == {"text-only__seed0"}
    assert "dinov2__cross_attention__2d-average__1__seed0" in other


def test_answers_name_the_clip_so_a_table_needs_no_store(question_store, stages, tmp_path):
    sweep = open_sweep(SweepConfig(subsets=("alone",)), stages, str(question_store), tmp_path / "sweep")
    run_sweep(sweep)
    shutil.rmtree(question_store)
    assert read_results(sweep.out).questions.videos == ("set/clip18.mp4", "set/clip19.mp4", "set/clip20.mp4")


def test_a_run_of_nested_grids_is_planned_once_per_fusion_whatever_the_subsets_and_grids():
    sweep = SweepConfig(
        subsets=("alone",), fusions=("cross_attention", "first"), grids=(4, 16), nested_grids=(16, 4, 1)
    )
    runs = plan_runs(sweep, get_stages("demo"), encoders=FOUR, snapshot="s", time_steps=16)
    nested = [run for run in runs if run.method == "one-shot, grids"]
    assert [run.name for run in nested] == [
        "nested-grids__cross_attention__2d-average__16-4-1__seed0",
    ]
    assert nested[0].encoders == FOUR
    projector = nested[0].stages[0].config.projector
    assert (projector.nested_grids, projector.grid) == ((16, 4, 1), (4, 4, 4))
    assert {run.stages[0].config.projector.nested_grids for run in runs if run not in nested} == {()}


def test_one_shot_runs_are_planned_where_no_subset_is_whole():
    sweep = SweepConfig(subsets=("alone",), one_shot=True, text_only=False)
    runs = plan_runs(sweep, get_stages("demo"), encoders=FOUR, snapshot="s", time_steps=16)
    assert [(run.method, len(run.encoders)) for run in runs] == [("retrained", 1)] * 4 + [("one-shot", 4)]


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        ({"nested_grids": (16, 8)}, {}, "squares such as 64, 16, 4, 1; got 8"),
        ({"nested_grids": (16, 4), "projectors": ("2d-attention",)}, {}, "trains with projector 2d-average"),
        ({"subsets": ("alone",), "post_hoc": True}, {}, "no subset is languagebind.dinov2.vivit.siglip"),
        ({}, {"mask_encoders": "subsets"}, "would hold for every run"),
    ],
)
def test_one_shot_runs_that_cannot_be_are_refused(axes, changes, message):
    (stage,) = get_stages("demo")
    stages = (replace(stage, config=replace(stage.config, **changes)),)
    with pytest.raises(UserError, match=message):
        plan_runs(SweepConfig(**axes), stages, encoders=FOUR, snapshot="s", time_steps=16)


def test_nested_grids_are_scored_and_stand_in_a_block_of_their_own(question_store, stages, tmp_path):
    axes = SweepConfig(subsets=("all",), grids=(4, 1), nested_grids=(4, 1), text_only=False)
    sweep = open_sweep(axes, stages, str(question_store), tmp_path / "sweep")
    assert {outcome.status for outcome in run_sweep(sweep)} == {"finished"}
    results = read_results(sweep.out)
    assert not results.missing
    nested = [member for member in results.answers if member.block == "one-shot, grids"]
    assert [member.setting.get("tokens_per_frame") for member in nested] == [4, 1]
    document = make_table(results, draws=100)
    (section,) = [s for s in document.sections if s.block == "one-shot, grids" and s.title == "Tokens per frame"][:1]
    accuracy = [row[3].value for row in section.rows]
    expected = [results.answers[member].credit_Q.mean() for member in reversed(nested)]  # by size
    assert accuracy == pytest.approx(expected)
    (sweep.out / "runs" / nested[0].run / "scores" / "heldout-grids.json").unlink()
    assert [outcome.status for outcome in run_sweep(sweep)].count("finished") == 7
    assert (sweep.out / "runs" / nested[0].run / "scores" / "heldout-grids.json").is_file()


def test_a_sweep_that_is_scored_by_letters_has_a_table(question_store, stages, tmp_path):
    by_letters = (replace(stages[0], config=replace(stages[0].config, protocol="letters")),)
    axes = SweepConfig(subsets=("alone",), text_only=False)
    sweep = open_sweep(axes, by_letters, str(question_store), tmp_path / "sweep")
    assert {outcome.status for outcome in run_sweep(sweep)} == {"finished"}
    results = read_results(sweep.out)
    assert not results.missing
    assert {found.margin_Q for found in results.answers.values()} == {None}


def test_options_of_one_run_before_the_command_are_refused():
    result = CliRunner().invoke(train_main, ["--llm", "fresh:tiny", "sweep"])
    assert result.exit_code == 1
    assert "found llm before it" in result.output
