"""Measure two commits side by side on one machine: medians of rounds that alternate between them.

    python scripts/measure_commits.py --base REV [--rounds 5] [--only NAME ...] [--json]

Cold means that nothing is remembered between runs (weights digests, media digests); the operating system's file cache
is warm in every figure. Peak memory is that of the largest process of a command.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
from compare.cases import TRAINING, Bench
from compare.sides import Side, two_sides

SCALE_STORE = "scale.zarr"
NUM_CLIPS = 6
BATCH = TRAINING["batch_size"]
WARM_UP_STEPS = 5  # left out of step times

TIMED = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({"code": code, "s": seconds, "mb": peak}))
"""
IMPORTED = """
import importlib, sys, time
began = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - began)
"""
READ = """
import json, random, statistics, sys, time
from featurestore import FeatureStore
store = FeatureStore.open(sys.argv[1])
encoder = "siglip"
ids = [clip["clip_id"] for clip in store.clips.to_pylist() if clip["kind"] == "video" and clip[encoder]]
def timed(clips):
    began = time.perf_counter()
    store.read(clips, encoder=encoder)
    return 1000 * (time.perf_counter() - began)
timed(ids)
warm = [timed(ids[:1]) for _ in range(200)]
order = random.Random(0)
shuffled = [timed([clip]) for _ in range(5) for clip in order.sample(ids, len(ids))]
batches = [timed(order.sample(ids, 8)) for _ in range(50)]
print(json.dumps({"warm": statistics.median(warm), "shuffled": statistics.median(shuffled),
                  "batch": statistics.median(batches)}))
"""
OPENED = """
import json, resource, sys, time
from featurestore import FeatureStore
began = time.perf_counter()
store = FeatureStore.open(sys.argv[1])
assert len(store) == int(sys.argv[2]), len(store)
seconds = time.perf_counter() - began
print(json.dumps({"s": seconds, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""
MAKE_SCALE_STORE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import scale  # the benchmark: the same store, without the tasks
os.fsync = lambda descriptor: None
place, clips = sys.argv[2], int(sys.argv[3])
listed = [scale.Clip(dataset="scale", path=f"{n // 1000:04}/{n:07}.mp4", kind="video") for n in range(clips)]
store = scale.StoreWriter.open_or_create(place)
store.ensure_group("video", scale.IDENTITY, batch_shape=1, weights_label="random:0")
store.add_clips(listed)
store.grow_groups()
view = scale.StoreView(store) if hasattr(scale, "StoreView") else store  # what the commit's plan_blocks takes
for b in scale.plan_blocks(view, {"still": scale.IDENTITY}, clip_ids={clip.clip_id for clip in listed}):
    scale.put_receipt(store, place, b.block, min(b.wanted["still"]), max(b.wanted["still"]) + 1)
store.publish_snapshot()
"""
Figures = Iterator[tuple[str, str, float]]  # name, unit, value


def timed(side: Side, *words: str | Path) -> dict[str, float]:
    """Wall time and peak memory of a command."""
    done = json.loads(side.run("python", "-c", TIMED, *side.command(*words)))
    if done["code"]:
        raise click.ClickException(f"{side.name}: {' '.join(map(str, words))} ended with {done['code']}")
    return done


def help_time(bench: Bench) -> Figures:
    """What a person waits for `--help`."""
    for program in ("merv-pipeline", "merv-train", "merv-eval"):
        yield f"{program} --help", "s", timed(bench.side, program, "--help")["s"]


def import_time(bench: Bench) -> Figures:
    """Every top-level package by itself."""
    for package in bench.side.packages():
        yield f"import {package}", "s", float(bench.side.run("python", "-c", IMPORTED, package))


def extract(bench: Bench) -> Figures:
    """Six clips with toy encoders: nothing remembered, a new store with all remembered, and nothing to do."""
    side = replace(bench.side, environment={"XDG_CACHE_HOME": str(bench.side.work / "measured" / "cache")})
    folder = side.work / "measured"
    shutil.rmtree(folder, ignore_errors=True)
    words = ["merv-pipeline", "extract", "--dataset", "demo", "--root", "demo-store/media"]
    words += ["--config", bench.toy_encoders("measured", options={"train": 48, "heldout": 16})]
    words += ["--limit", str(NUM_CLIPS), "--store", "measured/demo.zarr"]
    cold = timed(side, *words)
    again = timed(side, *words)
    shutil.rmtree(folder / "demo.zarr")
    warm = timed(side, *words)
    yield f"extract {NUM_CLIPS} clips, cold", "s", cold["s"]
    yield f"extract {NUM_CLIPS} clips, warm", "s", warm["s"]
    yield "extract, nothing to do", "s", again["s"]
    yield "extract, peak memory", "MB", cold["mb"]


def read(bench: Bench) -> Figures:
    """Latency of reading one encoder's tokens."""
    found = json.loads(bench.side.run("python", "-c", READ, "demo-store/demo.zarr"))
    yield "read one warm clip", "ms", found["warm"]
    yield "read shuffled clips, each", "ms", found["shuffled"]
    yield "read 8 shuffled clips", "ms", found["batch"]


def train(bench: Bench) -> Figures:
    """Step time from a store, the first steps left out; and the whole command."""
    out = bench.side.work / "measured-run"
    shutil.rmtree(out, ignore_errors=True)
    words = ["merv-train", "--recipe", "demo", "--config", bench.settings("train", {**TRAINING, "max_steps": 40})]
    done = timed(bench.side, *words, "--from-cache", "demo-store/demo.zarr", "--out", out.name)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [1000 * BATCH / row["samples_per_s"] for row in rows if "samples_per_s" in row]
    yield "training step from cache", "ms", statistics.median(steps[WARM_UP_STEPS:])
    yield "train 40 steps", "s", done["s"]
    yield "train, peak memory", "MB", done["mb"]


def open_large(bench: Bench) -> Figures:
    """Opening a store of very many clips."""
    place, clips = bench.media.parent / SCALE_STORE, int((bench.media.parent / "scale-clips").read_text())
    found = json.loads(bench.side.run("python", "-c", OPENED, place, str(clips)))
    yield f"open a store of {clips:,} clips", "s", found["s"]
    yield f"open {clips:,} clips, peak memory", "MB", found["mb"]


FIGURES: dict[str, Callable[[Bench], Figures]] = {
    "help": help_time,
    "import": import_time,
    "extract": extract,
    "read": read,
    "train": train,
    "open-large": open_large,
}


def prepare(sides: tuple[Side, Side], benches: dict[str, Bench], names: tuple[str, ...], scale_clips: int) -> None:
    """The stores that are read: one small store per side, and one large store that the base makes."""
    folder = benches["base"].media.parent
    for side in sides:
        if {"extract", "read", "train"} & set(names):
            with side.active():
                benches[side.name].run_case("demo-store")
    if "open-large" in names:
        (folder / "scale-clips").write_text(str(scale_clips))
        with sides[0].active():
            words = (sides[0].root / "benchmarks", folder / SCALE_STORE, str(scale_clips))
            sides[0].run("python", "-c", MAKE_SCALE_STORE, *words)


@click.command()
@click.option("--base", required=True, help="The commit to compare with.")
@click.option("--head", show_default="this checkout as it is", help="Measure this commit instead of the checkout.")
@click.option("--only", multiple=True, type=click.Choice(list(FIGURES)), help="Only these figures. Repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Runs of each side.")
@click.option("--scale-clips", type=click.IntRange(1), default=1_000_000, show_default=True, help="Of the large store.")
@click.option("--json", "as_json", is_flag=True, help="Print every value as JSON.")
def main(base: str, head: str | None, only: tuple[str, ...], rounds: int, scale_clips: int, as_json: bool) -> None:
    """Measure two commits, alternating between them."""
    names = only or tuple(FIGURES)
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"base": [], "current": []})
    units: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(prefix="measure-")).resolve()
    try:
        with two_sides(base, head, folder) as sides:
            benches = {side.name: Bench(side, None, folder / "media", {}, case="measure") for side in sides}
            prepare(sides, benches, names, scale_clips)
            for round_number in range(rounds):
                for name in names:
                    for side in sides if round_number % 2 == 0 else reversed(sides):
                        with side.active():
                            for label, unit, value in FIGURES[name](benches[side.name]):
                                units[label] = unit
                                values[label][side.name].append(value)
                click.echo(f"round {round_number + 1} of {rounds}", err=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        figures = {label: {"unit": units[label], **found} for label, found in values.items()}
        click.echo(json.dumps({"base": base, "figures": figures}, indent=2))
        return
    click.echo(f"{'median of ' + str(rounds):38} {'base':>22} {'current':>22} {'current/base':>13}")
    for label, found in values.items():
        click.echo(line(label, units[label], found))


def line(label: str, unit: str, found: dict[str, list[float]]) -> str:
    """One figure: median of each side with its range, and their ratio."""
    cells = [f"{_summary(found[side]):>22}" for side in ("base", "current")]
    both = all(found.values())
    ratio = f"{statistics.median(found['current']) / statistics.median(found['base']):.2f}" if both else "-"
    return f"{label + ' [' + unit + ']':38} {' '.join(cells)} {ratio:>13}"


def _summary(numbers: list[float]) -> str:
    if not numbers:
        return "-"
    digits = 3 if max(numbers) < 10 else 1 if max(numbers) < 1000 else 0
    middle, low, high = statistics.median(numbers), min(numbers), max(numbers)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
