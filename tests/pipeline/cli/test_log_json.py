"""`merv-pipeline extract --log-json` in a process of its own: every line of stderr parses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow


def extract(config: Path, *arguments: str) -> tuple[int, str, list[dict]]:
    program = Path(sys.executable).with_name("merv-pipeline")
    command = [str(program), "extract", "--config", str(config), "--json", "--log-json", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "event"} <= line.keys() for line in lines)
    return done.returncode, done.stdout, lines


def test_blocks_failures_and_errors_are_objects_and_exit_codes_stay(lab):
    root = lab.copy_of_root()
    (root / "valley/v6.mp4").write_bytes(b"no video")
    config = lab.folder / "config.yaml"
    config.write_text(yaml.safe_dump(lab.settings(encoders=["siglip"], kind="video")))
    code, out, lines = extract(config)
    assert code == 3
    assert json.loads(out)["failed"] == 1  # stdout is the result, as ever
    (failed,) = [line for line in lines if line["event"] == "quarantined"]
    assert (failed["level"], failed["clip"].rpartition("/")[2]) == ("warning", "v6.mp4")
    assert failed["reason"]
    blocks = [line for line in lines if line["event"] == "block"]
    assert sum(block["clips"] for block in blocks) == len(lab.VIDEOS)
    assert sorted(block["block"] for block in blocks) == [0, 1, 2]
    progress = [line for line in lines if line["event"] == "progress"][-1]
    assert (progress["label"], progress["done"], progress["failed"]) == ("extract", len(lab.VIDEOS), 1)
    (finished,) = [line for line in lines if line["event"] == "finished"]
    assert finished["exit_code"] == 3

    code, out, (error,) = extract(config, "--grid", "64,64,64", "--log-level", "error")
    assert (code, out) == (1, "")
    assert (error["event"], error["type"], error["exit_code"]) == ("error", "UserError", 1)
