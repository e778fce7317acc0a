"""Kill a sweep at random moments, again and again, and compare what it ends with.

    python -m tests.stress.sweep_kills [--kills 5] [--seed 0] [--scheduler local]

A small sweep of the demo's clips is run once undisturbed. Then the same command is started in a process group of its
own, killed with SIGKILL at a random moment (every other time just after it wrote something), and started again, until
it has been killed as often as asked; whenever a sweep gets through, its results are compared and another one begun.
Printed is a line per kill, and whether weights, losses and answers of every run are those of the undisturbed sweep.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import click
import yaml

from trainer.runs.run_record import read_metrics

SUBSETS = "dinov2,dinov2+siglip,languagebind+dinov2+vivit+siglip"
CLIPS = {"train": 48, "heldout": 16}
SETTINGS = {"batch_size": 8, "micro_batch_size": 8, "max_steps": 8, "checkpoint_every": 2, "keep_checkpoints": 9}


@click.command()
@click.option("--kills", type=click.IntRange(1), default=5, show_default=True, help="How often to kill.")
@click.option("--seed", default=0, show_default=True, help="Of the random moments.")
@click.option("--scheduler", help="Runs side by side on a cluster of two workers, instead of one after another.")
def main(kills: int, seed: int, scheduler: str | None) -> None:
    """Kill a sweep at random moments and compare the results that it ends with."""
    with tempfile.TemporaryDirectory(prefix="sweep-kills-") as folder:
        command = sweep_command(Path(folder), scheduler)
        began = time.monotonic()
        subprocess.run([*command, "--out", f"{folder}/whole"], check=True, capture_output=True)
        duration_s = time.monotonic() - began
        expected = results(Path(folder) / "whole")
        click.echo(f"undisturbed: {duration_s:.1f} s, {len(expected)} results")
        all_equal = kill_again_and_again(command, Path(folder), kills, duration_s, random.Random(seed), expected)
    sys.exit(0 if all_equal else 1)


def sweep_command(folder: Path, scheduler: str | None) -> list[str]:
    """The command without its folder, over a store of toy encoders that is made here."""
    settings = yaml.safe_load((files("pipeline") / "demo.yaml").read_text())
    settings |= {"root": f"{folder}/media", "options": CLIPS, "threads": 1}
    (folder / "extract.yaml").write_text(yaml.safe_dump(settings))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SETTINGS))
    programs, store = Path(sys.executable).parent, f"{folder}/demo.zarr"
    extract = [str(programs / "merv-pipeline"), "extract", "--config", f"{folder}/extract.yaml", "--store", store]
    subprocess.run(extract, check=True, capture_output=True)
    command = [str(programs / "merv-train"), "sweep", "--from-cache", store, "--recipe", "demo"]
    command += ["--config", f"{folder}/sweep.yaml", "--subsets", SUBSETS, "--post-hoc"]
    return [*command, *(["--scheduler", scheduler, "--workers", "2"] if scheduler else [])]


def kill_again_and_again(
    command: list[str], folder: Path, kills: int, duration_s: float, rng: random.Random, expected: dict[str, str]
) -> bool:
    """True if every sweep that got through has the results expected."""
    killed, sweeps, all_equal = 0, 0, True
    click.echo("kill  sweep  after [s]  files of results before -> after")
    while killed < kills:
        sweep = folder / f"cut{sweeps}"
        before, began = num_files(sweep), time.monotonic()
        code = run_and_kill([*command, "--out", str(sweep)], sweep, rng, duration_s, while_writing=killed % 2 == 0)
        if code == -signal.SIGKILL:
            killed += 1
            seconds = time.monotonic() - began
            click.echo(f"{killed:4}  {sweeps:5}  {seconds:9.2f}  {before:4} -> {num_files(sweep)}")
        else:
            all_equal &= judge(sweep, code, expected)
            sweeps += 1
    code = subprocess.run([*command, "--out", str(sweep)], capture_output=True).returncode
    return judge(sweep, code, expected) and all_equal


def run_and_kill(command: list[str], sweep: Path, rng: random.Random, duration_s: float, *, while_writing: bool) -> int:
    """Start the command and kill its process group; returns its exit code, or minus the signal.

    `while_writing`: just after it wrote a checkpoint or scores, else at any moment of the first half.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    before, deadline = num_files(sweep), time.monotonic() + rng.uniform(0, duration_s / 2)
    while process.poll() is None:
        if while_writing and num_files(sweep) > before:
            time.sleep(rng.uniform(0, 0.3))
            break
        if not while_writing and time.monotonic() > deadline:
            break
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def judge(sweep: Path, code: int, expected: dict[str, str]) -> bool:
    """Compare a sweep that got through, and say what differs."""
    found = results(sweep)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    equal = len(expected.keys() - set(differing))
    click.echo(f"{sweep.name} finished with exit code {code}: {equal} of {len(expected)} results are equal")
    for name in differing:
        click.echo(f"  differs: {name}")
    return code == 0 and not differing


def num_files(sweep: Path) -> int:
    """Checkpoints and files of scores."""
    return len([*sweep.glob("runs/*/checkpoints/step-*/state.json"), *sweep.glob("runs/*/scores/*.json")])


def results(sweep: Path) -> dict[str, str]:
    """Digest of the weights, losses and answers of every run."""
    found: dict[str, str] = {}
    for run in sorted((sweep / "runs").iterdir()):
        weights = max(run.glob("checkpoints/step-*/model.safetensors")).read_bytes()
        found[f"{run.name}: weights"] = hashlib.sha256(weights).hexdigest()
        found[f"{run.name}: losses"] = json.dumps([row["loss"] for row in read_metrics(run)])
        for scores in sorted((run / "scores").glob("*.json")):
            record = json.loads(scores.read_text())
            found[f"{run.name}: {scores.name}"] = json.dumps(record.get("answers") or record["subsets"])
    return found


if __name__ == "__main__":
    main()
