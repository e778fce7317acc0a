"""Kill an extraction at random moments, again and again, and compare what it ends with.

    python -m tests.stress.kills [--kills 20] [--seed 0] [--workers 1]

The demo's clips are extracted once undisturbed. Then the same command is started in a process of its own, killed with
SIGKILL at a random moment (every other time just after it committed something), and started again, until it has been
killed as often as asked; whenever a run gets through, its store is judged and another one begun. Printed is a line per
kill, and whether every file that is a function of the input has the bytes of the undisturbed store.
"""

from __future__ import annotations

import hashlib
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

from featurestore.maintenance.verify import verify_store
from pipeline.datasets import load_dataset

DETERMINISTIC = ("zarr.json", "clips", "samples", "video", "image", "receipts")
CLIPS = {"train": 80, "heldout": 16}


@click.command()
@click.option("--kills", type=click.IntRange(1), default=20, show_default=True, help="How often to kill.")
@click.option("--seed", default=0, show_default=True, help="Of the random moments.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
def main(kills: int, seed: int, workers: int) -> None:
    """Kill an extraction at random moments and compare the bytes that it ends with."""
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        command = extraction(Path(folder), workers)
        began = time.monotonic()
        subprocess.run([*command, "--store", f"{folder}/undisturbed.zarr"], check=True, capture_output=True)
        duration_s = time.monotonic() - began
        expected = hashes(Path(folder) / "undisturbed.zarr")
        click.echo(f"undisturbed: {duration_s:.1f} s, {len(expected)} files")
        all_equal = kill_again_and_again(command, Path(folder), kills, duration_s, random.Random(seed), expected)
    sys.exit(0 if all_equal else 1)


def extraction(folder: Path, workers: int) -> list[str]:
    """The command without its store: toy encoders, small blocks, one thread so that bytes can be compared."""
    load_dataset("demo", folder / "media", **CLIPS)  # drawn beforehand: drawing is not what is killed here
    settings = yaml.safe_load((files("pipeline") / "demo.yaml").read_text())
    settings |= {"root": f"{folder}/media", "options": CLIPS, "block_rows": {"video": 8, "image": 8}, "threads": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    script = Path(sys.executable).with_name("merv-pipeline")
    return [str(script), "extract", "--config", f"{folder}/config.yaml", "--workers", str(workers)]


def kill_again_and_again(
    command: list[str], folder: Path, kills: int, duration_s: float, rng: random.Random, expected: dict[str, str]
) -> bool:
    """True if every store that got through has the bytes expected."""
    killed, stores, all_equal = 0, 0, True
    click.echo("kill  store  after [s]  receipts before -> after")
    while killed < kills:
        store = folder / f"{stores}.zarr"
        before, began = num_receipts(store), time.monotonic()
        code = run_and_kill([*command, "--store", str(store)], store, rng, duration_s, while_committing=killed % 2 == 1)
        if code == -signal.SIGKILL:
            killed += 1
            seconds = time.monotonic() - began
            click.echo(f"{killed:4}  {stores:5}  {seconds:9.2f}  {before:4} -> {num_receipts(store)}")
        else:
            all_equal &= judge(store, code, expected)
            stores += 1
    code = subprocess.run([*command, "--store", str(store)], capture_output=True).returncode
    return judge(store, code, expected) and all_equal


def run_and_kill(
    command: list[str], store: Path, rng: random.Random, duration_s: float, *, while_committing: bool
) -> int:
    """Start the command and kill its process group; returns its exit code, or minus the signal."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    before = num_receipts(store)
    deadline = time.monotonic() + rng.uniform(0, duration_s)
    while process.poll() is None:
        if while_committing and num_receipts(store) > before:
            time.sleep(rng.uniform(0, 0.3))
            break
        if not while_committing and time.monotonic() > deadline:
            break
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def judge(store: Path, code: int, expected: dict[str, str]) -> bool:
    """Compare a store that got through, and say what differs."""
    found = hashes(store)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    findings = verify_store(store, "full")
    left = [path for path in (store / "tmp").rglob("*") if path.is_file() and path.suffix != ".lock"]
    is_good = code == 0 and not differing and not findings and not left
    click.echo(
        f"{store.name} finished with exit code {code}: {len(expected) - len(differing)} of {len(expected)} files have "
        f"the bytes of the undisturbed store, {len(findings)} findings of verify --full, {len(left)} temporary files"
    )
    for name in differing[:5]:
        click.echo(f"  differs: {name}")
    return is_good


def hashes(store: Path) -> dict[str, str]:
    """sha256 of every file that is a function of the input."""
    found = [file for top in DETERMINISTIC for file in [store / top, *(store / top).rglob("*")] if file.is_file()]
    return {file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def num_receipts(store: Path) -> int:
    return len(list(store.glob("receipts/*/*/*.json")))


if __name__ == "__main__":
    main()
