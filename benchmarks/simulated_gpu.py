"""How busy extraction keeps GPUs, simulated: real workers, real pipes and real blocks around a device that is a clock.

    python benchmarks/simulated_gpu.py --json
    python benchmarks/simulated_gpu.py --only '4 encoders, video*1 worker' --only '*8 workers'

Real are the driver's window of Dask tasks, the worker processes, their admission of blocks, stages and threads, the
pipes of the decode processes with frames of full size, and the store that is written, whose tokens are 64 times
narrower. Assumed are the times of the GPU, of decoding, of launching kernels and of pinned copies
(`simulated_engine.py`). Compressing, digesting, writing and reading back are charged per byte of full width at costs
that are measured first; what really runs, such as the pipes, is charged at the processor time that it took. Every
charge holds one of the C cores of the simulated host, in quanta, so that more threads than cores win nothing. All times
are dilated by one factor per case, so that the few cores of this machine can play C.

`busy` is the share of time in which a worker's GPU computes, in the steady state: between 30 and 70 % of its forwards.
`limit` is what the scarcest stage allows: the GPU, the decoders, or the cores for all that was charged.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.simulated_engine import (
    DECODE_S,
    GPU_MS,
    LAUNCH_S,
    HostCosts,
    Seen,
    Setup,
    compute,
    encoder_settings,
    install,
    look,
)
from featurestore.clips import Clip
from featurestore.records import row_digest
from featurestore.shards import encode_row
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import array_specs
from jobs.clusters import connect
from jobs.run import Task, run_tasks
from jobs.settings import ClusterRequest
from pipeline.config import EncoderSettings, EngineSettings
from pipeline.worker.admission import MAX_BLOCKS, QUEUED_TASKS
from pipeline.worker.block import BlockTask

ENCODERS = {4: ("languagebind", "dinov2", "vivit", "siglip"), 2: ("dinov2", "siglip"), 1: ("dinov2",)}
BATCH = {"video": 8, "image": 64}  # the defaults on a GPU
BLOCK_BATCHES = 2  # fewer than by default, so that a case has many blocks
STEADY = (0.3, 0.7)  # of a worker's forwards
FREE_CORES = 16  # of a worker's host where decoding costs nothing


@dataclass(frozen=True, kw_only=True)
class Case:
    encoders: int
    kind: str
    decoders: int | None  # None: decoding costs nothing
    workers: int

    @property
    def name(self) -> str:
        decoding = f"{self.decoders} decoders" if self.decoders else "free decoding"
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        return f"{self.encoders} encoder{'s' if self.encoders > 1 else ''}, {self.kind}, {decoding}, {workers}"

    @property
    def cores(self) -> int:
        """Of a worker: as many as it has decode processes."""
        return self.decoders or FREE_CORES

    @property
    def decode_s(self) -> float:
        return DECODE_S[self.kind] if self.decoders else 0.0

    @property
    def gpu_s(self) -> float:
        """GPU seconds per clip."""
        return sum(GPU_MS[self.kind][name] for name in ENCODERS[self.encoders]) / 1000


CASES = [
    Case(encoders=encoders, kind=kind, decoders=decoders, workers=workers)
    for workers, encoders, kind, decoders in itertools.product((1, 8), ENCODERS, GPU_MS, (None, 8, 24))
]


@click.command(context_settings={"show_default": True})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--only", multiple=True, metavar="GLOB", help="Only these cases, by name. Repeatable.")
@click.option("--blocks", default=16, help="Blocks per worker.")
@click.option("--load", default=0.3, help="Cores of this machine that a case may use: decides its dilation.")
def main(as_json: bool, only: tuple[str, ...], blocks: int, load: float) -> None:
    """Simulate every case and print its share of the limit."""
    costs, rows = measure_costs(), []
    click.echo(f"measured core seconds per GB: {costs}", err=True)
    cases = [case for case in CASES if not only or any(fnmatch.fnmatch(case.name, glob) for glob in only)]
    for workers, group in itertools.groupby(cases, lambda case: case.workers):
        with connect(ClusterRequest(num_workers=workers, device="cpu")) as client:
            for case in group:
                rows.append(simulate(client, case, costs, blocks, load))
                if not as_json:
                    click.echo(
                        "{name:45} busy {busy:.3f}  limit {limit:.3f}  of limit {of_limit:.3f}".format(**rows[-1])
                    )
                click.echo(json.dumps(rows[-1]), err=True)
    if as_json:
        click.echo(json.dumps({"cases": rows}, indent=2))


def simulate(client, case: Case, costs: HostCosts, blocks: int, load: float) -> dict:
    """One row of the table."""
    settings = EngineSettings(encoders=tuple(map(encoder_settings, ENCODERS[case.encoders])), device="cuda")
    folder = tempfile.TemporaryDirectory(prefix="simulated-", ignore_cleanup_errors=True)
    with folder as name, host_cores(Path(name), case) as fifo:
        tasks = planned_tasks(Path(name), case, settings, blocks * case.workers)
        dilation = round(max(10.0, real_cores(case) / load), 1)
        setup = Setup(
            fifo=fifo,
            dilation=dilation,
            encoders=ENCODERS[case.encoders],
            kind=case.kind,
            decoders=case.decoders or FREE_CORES // 2,
            cores=case.cores,
            decode_s=case.decode_s,
            costs=costs,
        )
        client.run(install, setup, settings)
        keyed = [Task(key=f"{name}-{task.block}", arguments=(task,)) for task in tasks]
        for outcome in run_tasks(client, compute, keyed, attempts=1, per_worker=MAX_BLOCKS + QUEUED_TASKS):
            if outcome.error is not None:
                raise outcome.error
        workers: list[Seen] = list(client.run(look, settings).values())
    return row(case, dilation, workers)


def row(case: Case, dilation: float, workers: list[Seen]) -> dict:
    """Busy share and limit of a case from what its workers saw."""
    clips = sum(report.clips for seen in workers for report in seen.reports)
    decoding_s = sum(report.seconds["decode (in its processes)"] for seen in workers for report in seen.reports)
    charged = sum((Counter(seen.charged) for seen in workers), Counter())
    cores_s = (sum(charged.values()) + decoding_s) / clips  # core seconds per clip
    num_decoders = case.decoders or FREE_CORES // 2
    rates = {  # clips per second of one worker
        "gpu": 1 / case.gpu_s,
        "launching": BATCH[case.kind] / (LAUNCH_S * case.encoders),
        "decoders": num_decoders * clips / decoding_s,
        "cores": case.cores / cores_s,
    }
    scarcest = min(rates, key=rates.get)
    limit = min(rates.values()) * case.gpu_s
    busy = statistics.fmean(steady_share(seen.forwards) for seen in workers)
    return {
        "name": case.name,
        "busy": round(busy, 4),
        "limit": round(limit, 4),
        "of_limit": round(busy / limit, 4),
        "scarcest": scarcest,
        "clips_per_s": round(busy / case.gpu_s * case.workers, 1),
        "dilation": dilation,
        "core_ms_per_clip": {name: round(1000 * s / clips, 3) for name, s in charged.items()}
        | {"decode processes": round(1000 * decoding_s / clips, 3)},
        "python_ms_per_clip": round(1000 * sum(seen.python_s for seen in workers) / clips, 2),
    }


def steady_share(forwards: list[tuple[float, float]]) -> float:
    """Share of time in which a device computes, from one forward's beginning to another's in the steady state."""
    ordered = sorted(forwards)
    first, last = (round(share * len(ordered)) for share in STEADY)
    busy = sum(end - begin for begin, end in ordered[first:last])
    return busy / (ordered[last][0] - ordered[first][0])


def real_cores(case: Case) -> float:
    """Cores of this machine that the case would use without dilation, roughly."""
    rate = min(1 / case.gpu_s, (case.decoders or np.inf) / (case.decode_s or 1))
    return case.workers * rate * {"video": 0.006 * (1 + case.encoders / 2), "image": 0.003}[case.kind]


@contextmanager
def host_cores(folder: Path, case: Case) -> Iterator[str]:
    """The cores of the host, all workers' together, as bytes in a named pipe."""
    fifo = folder / "cores"
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDWR)
    os.write(pipe, b"." * (case.cores * case.workers))
    try:
        yield str(fifo)
    finally:
        os.close(pipe)


def planned_tasks(folder: Path, case: Case, settings: EngineSettings, blocks: int) -> list[BlockTask]:
    """Tasks of the blocks of a new store; their clips are names only."""
    rows = BATCH[case.kind] * BLOCK_BATCHES
    store = StoreWriter.open_or_create(folder / "store.zarr", block_rows={case.kind: rows})
    clips = [Clip(dataset="d", path=f"{number}", kind=case.kind) for number in range(rows * blocks)]
    allocated = store.add_clips(clips)
    groups = {}
    for each in settings.encoders:
        identity = each.identity("0" * 64)
        store.ensure_group(case.kind, identity, batch_shape=BATCH[case.kind], weights_label="random:0")
        groups[each.name] = identity.group_name
    store.grow_groups()
    return [
        BlockTask(
            store=str(folder / "store.zarr"),
            root=str(folder),
            kind=case.kind,
            block=block,
            rows=tuple(part),
            wanted=dict.fromkeys(groups, frozenset(row for row, _ in part)),
            groups=groups,
            batch=BATCH[case.kind],
            accept_damaged=False,
            engine=settings,
        )
        for block in range(blocks)
        if (part := [(row, clip) for row, clip in allocated if row // rows == block])
    ]


def measure_costs() -> HostCosts:
    """Core seconds per byte on this machine: the least of several tries with one video's tokens of one encoder."""
    import hashlib

    identity = EncoderSettings(name="dinov2", weights="random:0").identity("0" * 64)
    spec = array_specs(identity, "video", blocks=1, block_rows=1)["tokens"]
    tokens = np.random.default_rng(0).normal(size=spec.row_shape).astype(np.float16)
    chunk = encode_row(spec, tokens)

    def least_s(work: Callable[[], object]) -> float:
        def once() -> float:
            began = time.thread_time()
            work()
            return time.thread_time() - began

        return min(once() for _ in range(9)) / tokens.nbytes

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "shard"

        def write() -> None:
            with path.open("wb") as file:
                file.write(chunk)
                os.fsync(file.fileno())

        def read_back() -> None:
            hashlib.sha256(chunk).hexdigest()
            hashlib.sha256(path.read_bytes()).hexdigest()

        return HostCosts(
            compress=least_s(lambda: encode_row(spec, tokens)),
            digest=least_s(lambda: row_digest({"tokens": tokens})),
            write=least_s(write),
            read_back=least_s(read_back),
        )


if __name__ == "__main__":
    main()
