"""What Dask costs: the same blocks through a plain pool of processes and through the window of tasks.

    python benchmarks/dask_cost.py [--workers 2] [--blocks 24] [--delay 0.05] [--rounds 3]

A folder of stills is extracted with an encoder of one convolution that sleeps `--delay` seconds per forward, in blocks
of sixteen clips. Both sides call the same function with the same tasks in as many processes, which have loaded the
encoder before the clock starts; rounds alternate. Printed: seconds of each round, clips per second, and the ratio; and
where Dask's time goes: before a worker's first block, between its blocks, and from the last block to the driver.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from tiny_encoders import install

from pipeline.worker.reports import BlockReport

ROWS, BATCH = 16, 4


def compute(task) -> BlockReport:
    """What a worker does for one block."""
    from pipeline.worker.isolate import compute_block

    return compute_block(task)


def idle_times(stream: list[dict], began: float, ended: float) -> tuple[float, float, float]:
    """Mean seconds of a worker without a block: before its first, between two, and of the driver after the last one."""
    blocks: dict[str, list[tuple[float, float]]] = {}
    for task in stream:
        spans = [(span["start"], span["stop"]) for span in task["startstops"] if span["action"] == "compute"]
        blocks.setdefault(task["worker"], []).extend(spans)
    ordered = [sorted(spans) for spans in blocks.values()]
    before = statistics.fmean(spans[0][0] - began for spans in ordered)
    between = statistics.fmean(b[0] - a[1] for spans in ordered for a, b in itertools.pairwise(spans))
    return before, between, ended - max(spans[-1][1] for spans in ordered)


def warm_up(settings, seconds: float) -> None:
    """Load the encoder; sleep, so that every process of a pool gets one of these."""
    from pipeline.worker.engine import engine_for

    engine_for(settings)
    time.sleep(seconds)


def draw(folder: Path, number: int) -> None:
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(number):
        Image.fromarray(rng.integers(0, 200, (24, 32, 3), dtype=np.uint8)).save(folder / f"{n:05}.png")


def planned_tasks(folder: Path, blocks: int) -> Callable[[str], list]:
    """Name of a store -> tasks of all its blocks; rows are given out."""
    from featurestore.writer import StoreWriter
    from pipeline.config import ExtractConfig
    from pipeline.datasets import load_dataset
    from pipeline.plan import StoreView, plan_blocks
    from pipeline.worker.block import BlockTask
    from pipeline.worker.engine import close_engines, describe_encoders

    draw(folder / "media", blocks * ROWS)
    listing = load_dataset("folder", folder / "media")
    config = ExtractConfig(
        dataset="folder",
        encoders=("tiny",),
        weights={"": "random:0"},
        grid=(2, 2, 2),
        compute_dtype="float32",
        device="cpu",
        threads=1,
        decode_processes=1,
    )
    identity = describe_encoders(config.engine_settings)["tiny"].identity
    close_engines()

    def tasks(name: str) -> list[BlockTask]:
        store = StoreWriter.open_or_create(folder / name, block_rows={"image": ROWS})
        store.ensure_group("image", identity, batch_shape=BATCH, weights_label="random:0")
        store.add_clips(listing.clips)
        store.grow_groups()
        planned = plan_blocks(StoreView(store), {"tiny": identity}, clip_ids={clip.clip_id for clip in listing.clips})
        common = BlockTask(
            store=str(folder / name),
            root=str(listing.root),
            kind="image",
            block=0,
            rows=(),
            wanted={},
            groups={"tiny": identity.group_name},
            batch=BATCH,
            accept_damaged=False,
            engine=config.engine_settings,
        )
        return [replace(common, block=block.block, rows=block.rows, wanted=block.wanted) for block in planned]

    return tasks


@click.command()
@click.option("--workers", default=2, show_default=True, help="Processes.")
@click.option("--blocks", default=24, show_default=True, help="Blocks of a round.")
@click.option("--delay", default=0.05, show_default=True, help="Seconds that a forward sleeps.")
@click.option("--rounds", default=3, show_default=True)
def main(workers: int, blocks: int, delay: float, rounds: int) -> None:
    """Measure what Dask costs beside a plain pool of processes."""
    with tempfile.TemporaryDirectory(prefix="dask-cost-") as name:
        folder = Path(name)
        install(folder / "plugins")
        here = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder / "plugins"), here, os.environ.get("PYTHONPATH", "")])
        os.environ["TINY_DELAY_S"] = str(delay)
        sys.path.insert(0, str(folder / "plugins"))
        compare(planned_tasks(folder, blocks), workers, rounds)


def compare(tasks: Callable[[str], list], workers: int, rounds: int) -> None:
    from dask_cost import compute, warm_up  # by its importable name: both kinds of worker unpickle it
    from distributed import get_task_stream

    from jobs.clusters import connect
    from jobs.run import Task, run_tasks
    from jobs.settings import ClusterRequest

    idle = []

    def by_dask(keyed: list[Task]) -> list[BlockReport]:
        began = time.time()
        with get_task_stream(client) as stream:
            results = [outcome.result for outcome in run_tasks(client, compute, keyed)]
            ended = time.time()
        idle.append(idle_times(stream.data, began, ended))
        return results

    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    with pool, connect(ClusterRequest(num_workers=workers)) as client:
        settings = tasks("warm")[0].engine
        list(pool.map(warm_up, [settings] * workers, [5.0] * workers))
        client.run(warm_up, settings, 0.0)
        seconds: dict[str, list[float]] = {"pool": [], "Dask": []}
        click.echo(f"{'round':5} {'pool [s]':>9} {'Dask [s]':>9}")
        for number in range(rounds):
            ours, theirs = tasks(f"dask-{number}"), tasks(f"pool-{number}")
            clips = sum(len(task.rows) for task in ours)
            keyed = [Task(key=f"block-{number}-{task.block}", arguments=(task,)) for task in ours]
            sides = {
                "pool": lambda theirs=theirs: list(pool.map(compute, theirs)),
                "Dask": lambda keyed=keyed: by_dask(keyed),
            }
            done = 0
            for side in sorted(sides, reverse=number % 2 == 0):  # whoever is first has the colder caches
                began = time.perf_counter()
                done += sum(report.clips for report in sides[side]())
                seconds[side].append(time.perf_counter() - began)
            assert done == 2 * clips, f"{done} of {2 * clips} clips"
            click.echo(f"{number:5} {seconds['pool'][-1]:9.2f} {seconds['Dask'][-1]:9.2f}")
        plain, dask = statistics.median(seconds["pool"]), statistics.median(seconds["Dask"])
        click.echo(
            f"{clips} clips in {len(ours)} blocks, {workers} workers: {clips / plain:.1f} clips/s by the pool, "
            f"{clips / dask:.1f} by Dask: {plain / dask:.3f} of the plain pool's throughput, "
            f"{1000 * workers * (dask - plain) / len(ours):.0f} ms per block"
        )
        before, between, after = (1000 * statistics.median(times) for times in zip(*idle, strict=True))
        click.echo(
            f"a worker of Dask's waits {before:.0f} ms for its first block, {between:.0f} ms between two; the driver "
            f"has the last result after {after:.0f} ms"
        )


if __name__ == "__main__":
    main()
