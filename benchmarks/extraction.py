"""Extraction beside its limit: pipeline time over bare decode and resize + bare encoder forward of the same frames.

    python benchmarks/extraction.py --dataset videollava --root DATA --out /tmp/extraction.json

Same cores, same torch threads, same batch shape, seeded weights. Bare decode: every clip through `decode_clip` in one
process per core, nothing else running. Bare forward: every batch of those frames through each encoder, tokens thrown
away. Pipeline: a whole run, decoding, encoding, compressing and committing, models loaded; without the reference clips,
which a store encodes once.

Wall time is worthless where other work shares the cores; `cpu ratio` compares processor time, of this process and all
that it starts, and rounds of bare and pipeline alternate because a machine drifts.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import psutil

from featurestore.clips import KINDS, Clip
from mervcache.errors import MediaError
from pipeline.config import ExtractConfig
from pipeline.datasets import DatasetListing, load_dataset
from pipeline.decode.decoders import decode_clip
from pipeline.decode.sampling import DecodeJob
from pipeline.extract import extract
from pipeline.views import View, distinct_views

if TYPE_CHECKING:
    from pipeline.worker.encode import TokenEncoder

CORES = len(os.sched_getaffinity(0))


@click.command(context_settings={"show_default": True})
@click.option("--dataset", default="videollava", help="Dataset by name.")
@click.option("--root", required=True, type=click.Path(exists=True), help="Folder of its media.")
@click.option("--encoders", default="languagebind,dinov2,vivit,siglip", help="Encoders, comma separated.")
@click.option("--limit", type=int, help="Only the first so many clips.")
@click.option("--kind", type=click.Choice(KINDS), help="Only this kind.")
@click.option("--decoders", default=CORES - 1 or 1, help="Decode processes of the pipeline.")
@click.option("--rounds", default=2, help="Bare and pipeline in turn, so often: a shared machine drifts.")
@click.option("--out", type=click.Path(), help="JSON file to write.")
def main(
    dataset: str, root: str, encoders: str, limit: int, kind: str, decoders: int, rounds: int, out: str | None
) -> None:
    """Print clips/s, the share of each stage, and the ratio to the limit."""
    config = ExtractConfig(
        dataset=dataset,
        root=root,
        limit=limit,
        kind=kind,
        encoders=tuple(encoders.split(",")),
        weights={"": "random:0"},
        threads=CORES,
        decode_processes=decoders,
        canaries=False,
    )
    listing = load_dataset(dataset, root, kind=kind, limit=limit)
    measured = [one_round(config, listing) for _ in range(rounds)]
    ratios = {name: sorted(figures[name] for figures in measured) for name in ("ratio", "cpu ratio")}
    result = {"clips": len(listing.clips), "cores": CORES, **ratios, "rounds": measured}
    if out:
        Path(out).write_text(json.dumps(result, indent=2))
    click.echo(json.dumps(result, indent=2))


def one_round(config: ExtractConfig, listing: DatasetListing) -> dict:
    figures = bare(config, listing)
    began = cpu_s()
    figures |= through_the_pipeline(config)
    cpu = {"bare": figures.pop("bare cpu"), "pipeline": cpu_s() - began}
    limit_s = figures["bare decode and resize"] + sum(figures["bare forward"].values())
    return figures | {
        "ratio": figures["pipeline"] / limit_s,
        "cpu seconds": cpu,
        "cpu ratio": cpu["pipeline"] / cpu["bare"],
        "clips/s": len(listing.clips) / figures["pipeline"],
    }


def cpu_s() -> float:
    """Processor seconds of this process and of all that it started, those that have ended included."""
    this = psutil.Process()
    times = [this.cpu_times(), *(child.cpu_times() for child in this.children(recursive=True))]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


def bare(config: ExtractConfig, listing: DatasetListing) -> dict:
    """Seconds of decoding alone on all cores, then of the forwards alone."""
    from pipeline.worker.engine import engine_for

    engine = engine_for(config.engine_settings)
    views = distinct_views(run.view for run in engine.encoders.values())
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        list(pool.map(_warm, range(CORES)))
        started, began = time.perf_counter(), cpu_s()
        decoded = list(pool.map(_decode, _jobs(listing, views)))
        decode_s, cpu = time.perf_counter() - started, cpu_s() - began
    batch, began = {kind: config.batch.get(kind) or engine.batch_of(kind) for kind in KINDS}, cpu_s()
    forward_s = {name: _forward(run, listing.clips, decoded, batch) for name, run in engine.encoders.items()}
    return {"bare decode and resize": decode_s, "bare forward": forward_s, "bare cpu": cpu + cpu_s() - began}


def decode_all(listing: DatasetListing, views: tuple[View, ...]) -> list[dict[View, np.ndarray] | None]:
    """Frames of every clip by view, None where it cannot be decoded."""
    return [_decode(job) for job in _jobs(listing, views)]


def _jobs(listing: DatasetListing, views: tuple[View, ...]) -> list[DecodeJob]:
    return [DecodeJob(root=listing.root, clip=clip, views=views) for clip in listing.clips]


def _warm(number: int) -> int:
    time.sleep(1)  # keep this process busy, so that every process of the pool starts
    return number


def _decode(job: DecodeJob) -> dict | None:
    try:
        return decode_clip(job).frames
    except MediaError:
        return None


def _forward(
    run: TokenEncoder, clips: Sequence[Clip], decoded: Sequence[dict | None], batch_sizes: Mapping[str, int]
) -> float:
    seconds = 0.0
    for kind in KINDS:
        frames = [d[run.view] for clip, d in zip(clips, decoded, strict=True) if d and clip.kind == kind]
        size = batch_sizes[kind]
        for start in range(0, len(frames), size):
            batch = np.zeros((size, *frames[0].shape), frames[0].dtype)
            batch[: len(frames[start : start + size])] = frames[start : start + size]
            began = time.perf_counter()
            run.tokens(batch)
            seconds += time.perf_counter() - began
    return seconds


def through_the_pipeline(config: ExtractConfig) -> dict:
    """Seconds of all blocks, with the engine that `bare` loaded, and what the run tells of its stages."""
    with tempfile.TemporaryDirectory() as folder:
        summary = extract(replace(config, store=f"{folder}/bench.zarr"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "pipeline": summary.elapsed_s,
        "stages": {name: seconds for name, seconds in summary.stage_s.items() if name != "total"},
        "bytes per clip": summary.bytes / max(1, summary.clips),
        "failed": summary.failed,
        "peak memory, this process and its largest child (GB)": peak * 1024 / 1e9,
    }


if __name__ == "__main__":
    main()
