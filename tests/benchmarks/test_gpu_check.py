"""The whole script at toy size on the CPU; its figures mean nothing here, that they are all there does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
ENCODERS = ["languagebind", "dinov2", "vivit", "siglip"]


def check(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *arguments, "--out", str(folder / "check.json")]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_every_check_runs_at_toy_size_and_is_marked_as_such(tmp_path):
    done = check(tmp_path, "--device", "cpu", "--toy", "--repeats", "1", "--micro-batch", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "check.json").read_text())
    assert result["is_toy"]
    assert not result["machine"]["is_gpu"]
    assert torch.__version__.startswith(result["machine"]["torch"])
    assert [row["is equal"] for row in result["encoders"]["neighbours"].values()] == [True] * 4
    assert list(result["encoders"]["float16"]) == ENCODERS
    assert [row["activation checkpointing"] for row in result["frozen step"]["runs"]] == [False, True]
    assert result["frozen step"]["runs"][0]["loss"] == pytest.approx(result["frozen step"]["runs"][1]["loss"], rel=1e-3)
    assert result["extraction"]["failed"] == 0
    assert result["extraction"]["ratio"] > 0
    assert "toy sizes: these figures say only that the script runs" in done.stdout
    assert done.stdout.count("| neighbours |") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 2
    assert "sees no CUDA device: nothing was measured" in done.stderr
    assert "--device cpu --toy" in done.stderr
    assert not (tmp_path / "check.json").exists()


def test_shares_of_a_range_are_counted():
    from encoder_checks import range_of

    found = range_of(np.float32([0.0, 1.0, -70000.0, 65504.0, 3e-5]))
    assert found["values"] == 5
    assert found["largest"] == 70000.0
    assert found["share above 65504"] == pytest.approx(0.2)
    assert found["share subnormal"] == pytest.approx(0.2)
    assert found["share not finite"] == 0.0


def test_bits_are_compared_not_values():
    from encoder_checks import same_bits

    assert same_bits(np.float32([np.nan]), np.float32([np.nan]))
    assert not same_bits(np.float32([0.0]), np.float32([-0.0]))
