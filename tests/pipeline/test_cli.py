"""The commands: results on stdout, JSON that parses, messages that help, exit codes that programs can read."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from pipeline.cli.extract import main

COMMANDS = ("extract", "plan", "status", "inspect", "report", "verify", "encoders", "datasets")
HEAVY = {"torch", "pyarrow", "transformers", "distributed", "dask", "zarr", "av", "accelerate", "PIL", "rich"}


@pytest.fixture(autouse=True)
def own_signals():
    """`extract` listens to SIGTERM; the tests' process must not go on doing so."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: object, code: int = 1) -> str:
    """What a person reads on stderr; nothing may be on stdout."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def config_file(lab) -> Path:
    path = lab.folder / "config.yaml"
    path.write_text(yaml.safe_dump(lab.settings(encoders=["siglip"], limit=3)))
    return path


def test_every_command_has_help():
    assert set(COMMANDS) <= set(main.commands)
    for name in main.commands:
        text = succeed(name, "--help")
        assert text.startswith(f"Usage: main {name}")
        assert main.commands[name].help.split(".")[0] in " ".join(text.split())


def test_the_list_of_commands_is_whole_on_a_terminal_of_80_columns():
    text = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    summaries = text.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert len(summaries) == len(main.commands)
    assert all(len(line) <= 80 and not line.endswith("...") for line in summaries), text


def test_help_imports_nothing_heavy():
    """It is asked for often, and torch alone takes seconds to load."""
    program = (
        "import sys; from pipeline.cli.extract import main\n"
        f"for command in ([], *([name] for name in {COMMANDS})):\n"
        "    main([*command, '--help'], standalone_mode=False)\n"
        f"print('LOADED', sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_the_driver_of_an_extraction_imports_no_torch():
    """A run with nothing to do ends before a worker is needed."""
    program = "import sys, pipeline.extract, pipeline.status; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_extract_prints_a_summary_for_a_person_and_progress_elsewhere(lab, config_file):
    result = call("extract", "--config", config_file)
    assert result.exit_code == 0, result.output
    assert "3 clips committed, 0 quarantined, 1 block," in result.stdout
    assert "encode:siglip" in result.stdout
    assert "extract: 3/3 clips" in result.stderr
    assert "extract: " not in result.stdout
    again = succeed("extract", "--config", config_file)
    assert "nothing to do: all 3 clips listed are committed or quarantined" in again


def test_an_extraction_that_finished_without_some_clips_has_an_exit_code_of_its_own(lab):
    """Two of three clips fail, fewer than --max-failed needs: in the last line of this run and of every later one."""
    lab.copy_of_root()
    for name in ("v0", "v1"):
        (lab.root / f"videochatgpt_tune/{name}.mp4").write_bytes(b"not a film")
    config = lab.folder / "config.yaml"
    config.write_text(yaml.safe_dump(lab.settings(encoders=["siglip"], limit=3, max_failed=0.1)))
    for again in ((), (), ("--json",), ("--retry-quarantine",)):
        result = call("extract", "--config", config, *again)
        assert result.exit_code == 3, result.output
        assert result.stderr.splitlines()[-1] == "finished with failures (exit code 3): 2 x clip quarantined"
    result = call("quarantine", "retry", lab.store)
    assert (result.exit_code, result.stderr.splitlines()[-1][:22]) == (3, "finished with failures")
    for name in ("v0", "v1"):
        lab.film(lab.root / f"videochatgpt_tune/{name}.mp4", *lab.VIDEOS["videochatgpt_tune/v2.mp4"])
    assert call("quarantine", "retry", lab.store).exit_code == 0
    assert call("extract", "--config", config).exit_code == 0


def test_media_that_are_absent_and_records_that_are_refused_are_in_the_exit_code(lab, config_file):
    lab.copy_of_root()
    annotations = lab.root / "videochatgpt_llavaimage_tune.json"
    (lab.root / "valley/v5.mp4").unlink()
    records = json.loads(annotations.read_text())
    annotations.write_text(json.dumps([*records, {"id": "x", "video": "../v.mp4", "conversations": []}]))
    config_file.write_text(yaml.safe_dump(lab.settings(encoders=["siglip"])))
    result = call("extract", "--config", config_file)
    assert result.exit_code == 3, result.output
    last = result.stderr.splitlines()[-1]
    assert "1 x medium listed but absent" in last or "2 x medium listed but absent" in last
    assert "1 x record refused at listing" in last


def test_json_of_every_command_parses_and_says_what_the_store_holds(lab, config_file):
    planned = json.loads(succeed("plan", "--config", config_file, "--probe", 1, "--json"))
    assert (planned["probed"], [row["to_do"] for row in planned["rows"]]) == (1, [3])
    summary = json.loads(succeed("extract", "--config", config_file, "--json"))
    assert (summary["clips"], summary["failed"]) == (3, 0)
    status = json.loads(succeed("status", lab.store, "--json"))
    assert [row["committed"] for row in status["encoders"]] == [3]
    clip = json.loads(succeed("inspect", "v0.mp4", "--store", lab.store, "--json"))
    assert clip["siglip"]["shape"] == [8, 3, 3, 32]
    assert json.loads(succeed("inspect", lab.store, "siglip", "--json"))["weights"] == "random:0"
    assert json.loads(succeed("verify", lab.store, "--full", "--json"))["findings"] == []
    names = [row["encoder"] for row in json.loads(succeed("encoders", "--json"))]
    assert names[:4] == ["languagebind", "dinov2", "vivit", "siglip"]
    assert {"videollava", "demo"} <= {row["dataset"] for row in json.loads(succeed("datasets", "--json"))}


def test_tables_name_what_json_names(extracted, tmp_path):
    status = succeed("status", extracted.store)
    assert "9 video clips, 5 image clips" in status
    assert all(name in status for name in extracted.ENCODERS)
    assert "8x3x3" in status
    assert "videollava/videochatgpt_tune/v0.mp4" in succeed("inspect", "v0.mp4", "--store", extracted.store)
    assert "no damage found (every byte read)" in succeed("verify", extracted.store, "--full")
    page = tmp_path / "page.html"
    assert succeed("report", extracted.store, "--out", page, "--clips", 1).strip() == str(page)
    assert page.exists()
    assert "siglip" in succeed("encoders")
    assert "data/videollava" in succeed("datasets")


def test_options_given_win_over_the_file(lab, config_file):
    other = lab.folder / "other.zarr"
    summary = json.loads(succeed("extract", "--config", config_file, "--store", other, "--limit", 1, "--json"))
    assert (summary["clips"], summary["store"]) == (1, str(other))


def test_a_changed_setting_is_explained_and_exits_with_1(config_file):
    succeed("extract", "--config", config_file)
    message = fail("extract", "--config", config_file, "--weights", "random:1")
    assert "Error: this store holds siglip as siglip-" in message
    assert "weights_sha256: stored" in message
    assert "use the same settings, or --new-identity to keep both" in message


def test_verify_exits_with_1_and_names_the_damaged_object(lab, extracted):
    shutil.copytree(extracted.store, lab.store)
    shard = next(lab.store.glob("video/vivit-*/tokens/c/0/*/*/*/*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    result = call("verify", lab.store, "--full", "--json")
    assert result.exit_code == 1
    assert [finding["key"] for finding in json.loads(result.stdout)["findings"]] == [
        shard.relative_to(lab.store).as_posix()
    ]
    assert call("verify", lab.store, "--full").exit_code == 1
    assert call("verify", lab.store).exit_code == 0  # the size is right: quick does not read it


MISTAKES = [
    (["extract"], "which dataset? give --dataset NAME; `merv-pipeline datasets` lists them"),
    (["extract", "--dataset", "videolava"], "unknown dataset 'videolava', the nearest known one is 'videollava'"),
    (
        ["extract", "--dataset", "demo", "--encoders", "videoma"],
        "unknown encoder 'videoma', the nearest known one is 'videomae'",
    ),
    (["extract", "--dataset", "demo", "--config", "none.yaml"], "config file none.yaml cannot be read: No such file"),
    (["extract", "--dataset", "videollava"], "the root of dataset videollava, "),
    (["plan", "--dataset", "videollava"], "or try everything without a download: --dataset demo"),
    (
        ["status", "none.zarr"],
        "none.zarr); make one with `merv-pipeline extract --dataset NAME --store PATH`",
    ),
    (["verify", "none.zarr"], "there is no feature store at none.zarr"),
    (["repair", "none.zarr"], "there is no feature store at none.zarr"),
    (["extract", "--dataset", "folder", "--root", "."], "no video or image under "),
    (["status"], "/features: make one with `merv-pipeline extract`, or give its path"),
    (["datasets", "videolava"], "unknown dataset 'videolava', the nearest known one is 'videollava'"),
    (["report", "none.zarr"], "there is no feature store at none.zarr"),
    (["inspect", "siglip", "--store", "none.zarr"], "there is no feature store at none.zarr"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value)[:50])
def test_a_mistake_is_told_with_the_next_step_and_exits_with_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*arguments)
    assert list(tmp_path.iterdir()) == []  # and leaves nothing behind


USAGE = [
    (["extract", "--decoder", "opencv"], "'opencv' is not one of 'frames/1', 'decord', 'ffmpeg'"),
    (["extract", "--storage-dtype", "int4"], "'int4' is not one of"),
    (["extract", "--grid", "16 by 8"], "several such as 16x16,8x8,raw; got '16 by 8'"),
    (["extract", "--workers", "0"], "0 is not in the range x>=1"),
    (["extract", "--max-failed", "2"], "2.0 is not in the range"),
    (["extrakt"], "No such command 'extrakt'"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=lambda value: " ".join(value)[:50])
def test_a_wrong_word_on_the_command_line_exits_with_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*arguments, code=2)


def test_an_unknown_key_of_the_config_names_the_nearest_known_one(config_file):
    config_file.write_text(config_file.read_text() + "storrage_dtype: uint8\n")
    message = fail("extract", "--config", config_file)
    assert f"{config_file}: unknown setting 'storrage_dtype', the nearest known one is 'storage_dtype'" in message


def test_an_unknown_scheduler_lists_the_known_ones(config_file):
    message = fail("extract", "--config", config_file, "--scheduler", "pbs")
    assert "unknown scheduler 'pbs'; known: local," in message


def test_the_only_store_under_features_need_not_be_named(extracted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "features").mkdir()
    (tmp_path / "features/one.zarr").symlink_to(extracted.store)
    assert "features/one.zarr" in succeed("status")
    (tmp_path / "features/two.zarr").symlink_to(extracted.store)
    assert "2 stores under features/, give the path of one: features/one.zarr, features/two.zarr" in fail("status")
    message = fail("status", "features/onne.zarr")
    assert f"no feature store at features/onne.zarr ({tmp_path}/features/onne.zarr); nearby: features/one.z" in message


def test_the_config_printed_is_the_config_that_runs(lab, config_file, tmp_path):
    printed = succeed("extract", "--config", config_file, "--limit", 2, "--print-config")
    assert not lab.store.exists()
    (tmp_path / "again.yaml").write_text(printed)
    assert succeed("extract", "--config", tmp_path / "again.yaml", "--print-config") == printed
    assert json.loads(succeed("extract", "--config", tmp_path / "again.yaml", "--json"))["clips"] == 2


def test_the_command_that_projectors_name_asks_for_raw_grids_and_class_tokens(config_file):
    command = "extract --grid raw --prefix-tokens --store features/toy-raw.zarr --print-config".split()
    printed = yaml.safe_load(succeed(*command, "--config", config_file))
    assert (printed["grid"], printed["prefix_tokens"], printed["store"]) == ("raw", True, "features/toy-raw.zarr")


def test_one_dataset_is_told_with_what_to_get_and_its_options():
    told = succeed("datasets", "videollava")
    assert all(word in told for word in ("align, finetune", "data/videollava", "what to get"))
    assert json.loads(succeed("datasets", "videollava", "--json"))["dataset"] == "videollava"


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert succeed("--version").strip().endswith(version("merv-pipeline"))
