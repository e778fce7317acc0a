import json
import re

import pytest
import yaml
from click.testing import CliRunner

from mervcache.config import overlay
from trainer.cli import train_main
from trainer.cli_eval import eval_main
from trainer.recipes import get_recipe

SMALL = {
    "llm": "fresh:mini",
    "projector": {"grid": [2, 2, 2]},
    "max_steps": 3,
    "batch_size": 6,
    "micro_batch_size": 6,
    "checkpoint_every": 2,
}


@pytest.fixture
def here(tmp_path, monkeypatch, question_store):
    """A working folder with features/toy.zarr and a config of some seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path


def call(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def train(*arguments):
    return call(train_main, "--from-cache", "--recipe", "demo", "--config", "small.yaml", *arguments)


def test_the_only_store_is_trained_from_and_the_run_answers_held_out_questions(here):
    result = train("--out", "run", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["run"], told["steps"], told["num_steps"]) == ("run", 3, 3)
    assert "train" in result.stderr  # progress is not among the results
    assert train("--mode", "text-only", "--out", "words").exit_code == 0

    result = call(eval_main, "run", "--checkpoint", "run", "--baseline", "words", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["scores"][0]["questions"] == told["beside"]["words"][0]["questions"] == 3
    assert told["scores"][0]["chance"] == pytest.approx(1 / 3)

    result = call(eval_main, "run", "--checkpoint", "run", "--baseline", "words")
    assert "colour" in result.stdout
    assert "chance" in result.stdout


def test_resume_auto_is_one_command_for_the_first_start_and_the_next(here):
    assert json.loads(train("--out", "run", "--resume", "auto", "--json").stdout)["steps"] == 3
    assert train("--out", "run").exit_code == 1
    assert json.loads(train("--out", "run", "--resume", "auto", "--json").stdout)["steps"] == 3


def test_resume_run_needs_nothing_but_the_run(here):
    train("--out", "run")
    result = call(train_main, "--resume", "run", "--json")
    assert json.loads(result.stdout)["run"] == "run", result.output


def test_a_dry_run_writes_nothing(here):
    result = train("--out", "run", "--dry-run", "--json")
    told = json.loads(result.stdout)
    assert (told["samples"], told["visual_tokens"], told["steps"]) == (18, 8, 3)
    assert set(told["parameters"]) == {"projectors", "fusion", "llm"}
    assert not (here / "run").exists()


def test_a_run_that_does_not_fit_is_made_smaller_or_refused_before_it_starts(here):
    report = json.loads(train("--dry-run", "--device-memory", "1GB", "--json").stdout)
    assert (report["device_bytes"], report["micro_batch"]) == (10**9, "micro_batch_size 6")
    total = report["memory_bytes"]["total"]
    tight = f"{total / 0.92 / 1e6 - 0.01:.3f}MB"  # just too little for what was configured
    smaller = json.loads(train("--dry-run", "--device-memory", tight, "--json").stdout)
    assert smaller["memory_bytes"]["total"] < total
    for options in (["--dry-run"], ["--out", "run"], ["--dry-run", "--launch", "ddp", "--processes", "2"]):
        refused = train(*options, "--device-memory", "0.1MB")
        assert refused.exit_code == 1
        assert "a process at the least" in refused.stderr
    assert not (here / "run" / "config.yaml").exists()


def test_a_dry_run_is_a_short_table_for_a_person(here):
    told = train("--dry-run").stdout
    assert len(told.splitlines()) < 30
    for name, value in (("steps", "3 of 6 samples"), ("samples", "18"), ("visual tokens", "8"), ("dropped", "none")):
        assert re.search(rf"^{name} +{value}$", told, re.MULTILINE), told
    for words in ("text tokens", "trained of llm", "GB, total", "GB on disk"):
        assert words in told


def test_the_settings_in_force_are_printed_and_read_back(here):
    printed = train("--fusion", "equal_mix", "--print-config").stdout
    assert overlay(get_recipe("demo"), yaml.safe_load(printed)).fusion.name == "equal_mix"
    (here / "all.yaml").write_text(printed)
    assert call(train_main, "--config", "all.yaml", "--print-config").stdout == printed
    assert not (here / "runs").exists()


def test_both_stages_of_a_chain_are_printed_and_read_back(here):
    printed = call(train_main, "--mode", "full", "--llm", "fresh:mini", "--print-config").stdout
    assert set(yaml.safe_load(printed)["stages"]) == {"align", "finetune"}
    (here / "all.yaml").write_text(printed)
    assert call(train_main, "--mode", "full", "--config", "all.yaml", "--print-config").stdout == printed


def test_a_finished_run_says_what_comes_next(here):
    last = train("--out", "run").stdout.splitlines()[-1]
    assert re.fullmatch(r"run: step 3 of 3, loss \d+\.\d{4}; next: merv-eval run --checkpoint run", last)


def test_a_place_that_is_wrong_is_said_before_anything_is_loaded(here, monkeypatch):
    assert train("--out", "run").exit_code == 0
    monkeypatch.setattr("trainer.cli.load_torch_modules", lambda: pytest.fail("loaded"))
    assert "run holds a run already; go on with --resume auto" in error_of(train("--out", "run"))
    message = error_of(call(train_main, "--from-cache", "features/ty.zarr"))
    assert "no feature store at features/ty.zarr (" in message
    assert "/features/ty.zarr); nearby: features/toy.zarr" in message


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--checkpoint", "nothing"),
        ("run", "--checkpoint", "run", "--baseline", "nothing"),
        ("distortion", "--checkpoint", "nothing"),
        ("export", "--checkpoint", "nothing", "--out", "new"),
        ("ask", "--checkpoint", "nothing", "What?"),
    ],
)
def test_a_folder_without_a_run_is_said_before_anything_is_loaded(here, monkeypatch, words):
    (here / "run").mkdir()
    (here / "run" / "config.yaml").touch()
    monkeypatch.setattr("trainer.cli_eval.load_torch_modules", lambda: pytest.fail("loaded"))
    assert "nothing holds no run; give the folder" in error_of(call(eval_main, *words))


def test_options_win_over_the_file_and_the_file_over_the_recipe(here):
    result = train("--out", "run", "--fusion", "equal_mix", "--head", "gelu-mlp")
    assert result.exit_code == 0, result.output
    written = overlay(get_recipe("demo"), yaml.safe_load((here / "run/config.yaml").read_text()))
    assert (written.fusion.name, written.projector.head) == ("equal_mix", "gelu-mlp")
    assert (written.projector.grid, written.max_steps) == ((2, 2, 2), 3)
    assert written.projector.standardise == get_recipe("demo").projector.standardise


def error_of(result):
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.stderr


def test_two_stores_are_an_error_that_lists_them(here):
    (here / "features/other.zarr").symlink_to((here / "features/toy.zarr").resolve())
    message = error_of(train())
    assert "2 stores under features/, give the path of one: features/other.zarr, features/toy.zarr" in message


def test_no_store_is_an_error_that_says_how_to_make_one(here, monkeypatch):
    (here / "empty").mkdir()
    monkeypatch.chdir(here / "empty")
    assert "merv-pipeline extract" in error_of(call(train_main, "--from-cache", "--recipe", "demo"))
    assert "give --from-cache STORE" in error_of(call(train_main, "--recipe", "demo")).replace("Give", "give")
    assert "no feature store at nowhere" in error_of(call(train_main, "--from-cache", "nowhere", "--recipe", "demo"))


def test_an_unknown_setting_in_the_file_names_the_nearest(here):
    (here / "small.yaml").write_text("fusion: {nmae: first}\n")
    assert "unknown setting 'fusion.nmae', the nearest known one is 'fusion.name'" in error_of(train())


def test_an_unknown_encoder_lists_those_of_the_store(here):
    (here / "small.yaml").write_text(yaml.safe_dump({**SMALL, "encoders": ["siglip"]}))
    message = error_of(train())
    assert "unknown encoder 'siglip'; known: dinov2, vivit. This store has no siglip tokens" in message
    assert "merv-pipeline extract ... --encoders siglip" in message


def test_an_llm_that_is_nowhere_says_what_can_be_given(here):
    assert "LLM './nowhere' cannot be loaded: there is no such folder; give a Hub id" in error_of(
        train("--llm", "./nowhere")
    )


def test_a_folder_that_is_no_run_is_an_error(here):
    assert "nothing holds no run" in error_of(call(eval_main, "run", "--checkpoint", "nothing"))
    assert "nothing is not a run" in error_of(call(train_main, "--resume", "nothing"))


@pytest.mark.parametrize("command", [train_main, eval_main])
def test_help_says_what_the_command_does(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Options:" in result.stdout
