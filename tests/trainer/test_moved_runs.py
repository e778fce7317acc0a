"""A run, its LLM and its store are moved together, and used from another working directory."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from featurestore import FeatureStore, StoreWriter
from featurestore.clips import Sample, Turn
from mervcache.config import overlay
from mervcache.errors import StoreDamagedError, UserError
from trainer.ablation.execute import open_recorded, open_sweep
from trainer.ablation.sweep import SweepConfig, add_to_record, read_sweep
from trainer.ask import Asker
from trainer.cli import train_main
from trainer.cli_eval import eval_main
from trainer.config import TrainConfig, read_config
from trainer.paths import found_path, recorded_path
from trainer.recipes import Stage
from trainer.runs.load import load_run
from trainer.runs.run_record import RunRecord, read_metrics

STORE, LLM, RUN = "features/colours.zarr", "models/llm", "runs/first"


def call(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def project(tmp_path, monkeypatch, extracted, pretrained, config):
    """The working directory of a user who names everything by relative paths."""
    home = tmp_path / "project"
    shutil.copytree(extracted, home / STORE)
    shutil.copytree(pretrained, home / LLM)
    writer = StoreWriter.open_or_create(home / STORE)
    writer.add_samples(
        "bench", [question(clip) for clip in FeatureStore.open(home / STORE).clips["clip_id"].to_pylist()[:2]]
    )
    writer.publish_snapshot()
    settings = replace(config, llm=LLM, train_llm="none", max_steps=4, log_every=1, checkpoint_every=2)
    (home / "settings.yaml").write_text(settings.to_yaml())
    monkeypatch.chdir(home)
    return home


def question(clip_id):
    turns = (Turn(role="human", text="<video>\nWhat colour is it?"), Turn(role="gpt", text="red"))
    return Sample(
        sample_id=f"held-{clip_id}",
        clip_id=clip_id,
        turns=turns,
        stage="eval",
        split="heldout",
        source="bench",
        options=("red", "green"),
        answer_index=0,
    )


def train(out=RUN):
    return call(train_main, "--from-cache", STORE, "--recipe", "demo", "--config", "settings.yaml", "--out", out)


@pytest.fixture
def moved(project, tmp_path, monkeypatch):
    """The project in its new place, seen from a folder of its own; the run has two of its four steps left."""
    train()
    shutil.rmtree(project / RUN / "checkpoints" / "step-00000004")
    rows = read_metrics(project / RUN)
    home = tmp_path / "elsewhere" / "renamed"
    home.parent.mkdir()
    shutil.move(project, home)
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    return home, rows


@pytest.mark.slow
def test_a_moved_run_resumes_evaluates_answers_and_is_exported(moved, media_root):
    home, rows = moved
    done = json.loads(call(train_main, "--resume", home / RUN, "--json").stdout)
    assert done["steps"] == 4
    assert [row["loss"] for row in read_metrics(home / RUN)] == [row["loss"] for row in rows]
    scores = json.loads(call(eval_main, "run", "--checkpoint", home / RUN, "--json").stdout)
    assert scores["scores"][0]["questions"] == 2
    film = media_root / "films/red.mp4"
    asked = call(eval_main, "ask", "--checkpoint", home / RUN, "--video", film, "--json", "What colour is it?")
    assert len(json.loads(asked.stdout.splitlines()[-1])["answers"]) == 1
    call(eval_main, "export", "--checkpoint", home / RUN, "--out", home / "exports/first")
    assert read_config(home / "exports/first").llm == str(home / LLM)
    assert load_run(home / "exports/first").step == 4


def moved_alone(project, train_llm):
    """The run, moved to another depth without its LLM; its checkpoint's weights of the LLM as they are to be loaded."""
    settings = yaml.safe_load((project / "settings.yaml").read_text())
    (project / "settings.yaml").write_text(yaml.safe_dump({**settings, "train_llm": train_llm}))
    train()
    before = load_run(project / RUN).built.llm.model.state_dict()
    (project / "deep/a/b").mkdir(parents=True)
    shutil.move(RUN, "deep/a/b/mine")
    return Path("deep/a/b/mine"), before


@pytest.mark.slow
def test_a_run_that_trained_all_of_its_llm_needs_nothing_outside_its_folder(project, media_root):
    run, before = moved_alone(project, "full")
    shutil.rmtree(project / LLM)
    loaded = load_run(run).built.llm
    assert loaded.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    film = media_root / "films/red.mp4"
    asked = call(eval_main, "ask", "--checkpoint", run, "--video", film, "--json", "What colour is it?")
    assert len(json.loads(asked.stdout.splitlines()[-1])["answers"]) == 1
    call(eval_main, "export", "--checkpoint", run, "--out", "exports/mine")
    assert read_config(Path("exports/mine")).llm == "llm"
    assert "the local LLM `llm`" in Path("exports/mine/README.md").read_text()
    with pytest.raises(UserError, match="holds its LLM: leave out --llm"):
        load_run(run, llm=LLM)


@pytest.mark.slow
def test_the_llm_of_a_moved_run_is_named_anew(project, media_root):
    run, before = moved_alone(project, "none")
    film = media_root / "films/red.mp4"
    ask = ("ask", "--checkpoint", run, "--video", film, "What colour is it?")
    score = ("run", "--checkpoint", run, "--store", STORE)
    for command in (ask, score):
        refused = CliRunner().invoke(eval_main, list(map(str, command)))
        assert refused.exit_code == 1
        assert "there is no folder deep/a/models/llm" in refused.stderr
        assert "(recorded as ../../models/llm in config.yaml)" in refused.stderr
        assert "--llm" in refused.stderr
        call(eval_main, *command, "--llm", LLM)
    with Asker(run, llm=LLM) as asker:
        assert all(torch.equal(value, before[name]) for name, value in asker.model.llm.state_dict().items())
    other = shutil.copytree(project / LLM, "models/other")
    settings = json.loads((Path(other) / "config.json").read_text())
    (Path(other) / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    with pytest.raises(StoreDamagedError, match=r"config\.json \(changed\)"):
        load_run(run, llm=str(other))


@pytest.mark.slow
def test_the_files_of_a_run_name_no_folder_of_the_machine(project):
    train()
    for name in ("config.yaml", "run.json"):
        assert str(project) not in (project / RUN / name).read_text()
    assert yaml.safe_load((project / RUN / "config.yaml").read_text())["llm"] == "../../models/llm"
    assert json.loads((project / RUN / "run.json").read_text())["store"] == "../../features/colours.zarr"
    assert (read_config(Path(RUN)).llm, RunRecord.read(Path(RUN)).store) == (LLM, STORE)
    os.chdir("runs")
    assert read_config(Path("first")).llm == str(project / LLM)


@pytest.mark.slow
def test_the_card_of_a_local_llm_says_that_it_is_not_here(project):
    train()
    cards = {}
    for name, options in {"named": (), "whole": ("--with-llm",)}.items():
        call(eval_main, "export", "--checkpoint", RUN, "--out", f"exports/{name}", *options)
        cards[name] = Path(f"exports/{name}/README.md").read_text()
        assert "the local LLM `llm`" in cards[name]
        assert "base_model" not in cards[name]
    assert "The LLM's weights are not here" in cards["named"]
    assert "where they are published" not in cards["named"]
    assert "The LLM's weights are in `llm/`" in cards["whole"]


def test_a_sweep_is_moved_with_its_store_and_llm(project, tmp_path, monkeypatch):
    settings = Path("settings.yaml")
    stages = (Stage(name="finetune", config=overlay(TrainConfig(), yaml.safe_load(settings.read_text()))),)
    axes, out = SweepConfig(subsets=("alone",), split="heldout"), Path("runs/sweep")
    begun = open_sweep(axes, stages, STORE, out)
    add_to_record(out, begun.pins, begun.axes, begun.runs, store=STORE)
    written = (out / "sweep.json").read_text()
    assert str(project) not in written
    assert (begun.store, read_sweep(out)["store"]) == (STORE, STORE)
    home = shutil.move(project, tmp_path / "renamed")
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    found = open_recorded(home / out)
    assert found.store == str(home / STORE)
    assert {run.stages[0].config.llm for run in found.runs} == {str(home / LLM)}
    assert {run.name for run in found.runs} == {run.name for run in begun.runs}
    add_to_record(home / out, found.pins, found.axes, found.runs, store=found.store)
    assert json.loads((home / out / "sweep.json").read_text()) == json.loads(written)


def test_what_is_no_local_relative_path_stays(project):
    for path in ("HuggingFaceTB/SmolLM2-135M", "s3://bucket/lab.zarr", "fresh:tiny", str(project / LLM)):
        assert recorded_path(path, Path(RUN)) == path
        assert found_path(path, Path(RUN)) == path


def test_a_path_inside_the_run_is_no_hub_id(project):
    assert recorded_path(LLM, Path(".")) == f"./{LLM}"
    assert found_path(f"./{LLM}", Path(".")) == LLM


def test_a_path_of_an_earlier_version_is_that_of_the_working_directory(project):
    os.chdir("models")
    assert found_path(f"../{STORE}", Path("llm")) == f"../{STORE}"


def test_a_path_that_is_gone_is_reported_where_the_run_wants_it(project):
    assert found_path("../../features/gone.zarr", Path(RUN)) == "features/gone.zarr"
