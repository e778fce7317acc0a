"""Seconds per clip of an extraction and per training step, against the number of encoders, on this machine.

    python benchmarks/encoder_count.py --root data/demo --config pipeline/demo.yaml --out count.json  # toy sizes
    merv-eval report RUN --with count.json                                                            # its plots

The first 1, 2, ... encoders of the settings extract the first videos of a dataset into temporary stores: in series, one
worker that runs all encoders on a clip, and on several workers, among which clips are spread. A step is then measured
from the store and end to end, with the same model and batches.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from mervcache.files import replace_text
from pipeline.config import ExtractConfig, read_config
from pipeline.extract import extract
from trainer.ablation.document import Column, Document, Plot, Row, Section
from trainer.ablation.render import print_document, to_json
from trainer.config import OptimizerConfig, ProjectorConfig, TrainConfig
from trainer.end_to_end import live_source
from trainer.loop.train import train
from trainer.runs.run_record import read_metrics
from trainer.sources import open_store

RATE = 1e-4


@click.command(context_settings={"show_default": True})
@click.option("--root", required=True, help="Folder of the media and annotations.")
@click.option("--dataset", default="demo", help="Its layout.")
@click.option(
    "--config", "config_file", type=click.Path(exists=True, dir_okay=False), help="Settings of the extraction."
)
@click.option("--clips", type=click.IntRange(min=8), default=64, help="Videos that are extracted.")
@click.option("--workers", default=2, help="Of the second extraction with each number of encoders.")
@click.option("--rounds", default=1, help="Extractions of each kind, in turn; the shortest counts.")
@click.option("--steps", default=6, help="Training steps, the first of which does not count.")
@click.option("--batch-size", default=8, help="Samples per step.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file for merv-eval report --with.")
def main(
    config_file: str | None, workers: int, rounds: int, steps: int, batch_size: int, out: Path | None, **options: Any
) -> None:
    """Print both tables, and write them with --out."""
    torch.set_num_threads(1)
    settings = {"dataset": options["dataset"], "root": options["root"], "kind": "video", "limit": options["clips"]}
    base = read_config(config_file, {**settings, "threads": 1})
    train_config = TrainConfig(
        llm="fresh:tiny",
        train_llm="full",
        stage="finetune",
        projector=ProjectorConfig(grid=None),
        optimizer=OptimizerConfig(projector_lr=RATE, fusion_lr=RATE, llm_lr=RATE),
        batch_size=batch_size,
        micro_batch_size=batch_size,
        max_steps=steps,
        precision="fp32",
        log_every=1,
        checkpoint_every=steps,
    )
    counts = range(1, len(base.encoders) + 1)
    with tempfile.TemporaryDirectory() as folder:
        extractions = list(measure_extractions(Path(folder), base, counts, workers, rounds))
        trained = list(measure_steps(Path(folder), base, counts, train_config, settings, config_file))
    document = as_document(base, extractions, trained, rounds)
    print_document(document, "text")
    if out is not None:
        replace_text(out, to_json(document))


def measure_extractions(folder: Path, base: ExtractConfig, counts: range, workers: int, rounds: int) -> Iterator[Row]:
    """(encoders, how, seconds per further clip, seconds before the first) of every kind of extraction.

    By two extractions, of all clips and of a quarter. The stores that one worker made of all clips stay in `folder`.
    """
    few, many = base.limit // 4, base.limit
    elapsed: dict[tuple[int, int, int], float] = {}
    kinds = [
        (count, number, clips) for count in counts for number in dict.fromkeys((1, workers)) for clips in (few, many)
    ]
    for turn in range(rounds):
        for kind in kinds:
            count, number, clips = kind
            store = str(folder / f"{count}-{number}-{clips}-{turn}.zarr")
            settings = {"store": store, "encoders": base.encoders[:count], "workers": number, "limit": clips}
            summary = extract(replace(base, canaries=False, **settings), quiet=True)
            elapsed[kind] = min(summary.elapsed_s, elapsed.get(kind, summary.elapsed_s))
    for count, number, clips in kinds:
        if clips == few:
            seconds = (elapsed[count, number, many] - elapsed[count, number, few]) / (many - few)
            how = "in series, one worker" if number == 1 else f"on {number} workers"
            yield count, how, seconds, elapsed[count, number, few] - few * seconds


def measure_steps(
    folder: Path,
    base: ExtractConfig,
    counts: range,
    config: TrainConfig,
    settings: dict[str, Any],
    config_file: str | None,
) -> Iterator[Row]:
    """(encoders, where tokens come from, median seconds per step)."""
    for count in counts:
        chosen = replace(config, encoders=base.encoders[:count])
        file = Path(config_file) if config_file else None
        runs = {"from the store": open_store(str(folder / f"{count}-1-{settings['limit']}-0.zarr"), chosen)}
        with live_source(chosen, {**settings, "threads": 1}, file, out=folder / f"live-{count}") as live:
            for name, (samples, source) in {**runs, "end to end": live}.items():
                run = folder / f"{name}-{count}"
                train(chosen, samples, source, run, quiet=True)
                speeds = [row["samples"] / row["samples_per_s"] for row in read_metrics(run)[1:]]
                yield count, name, statistics.median(speeds)


def as_document(base: ExtractConfig, extractions: list[Row], steps: list[Row], rounds: int) -> Document:
    """Both tables, with what they were measured on."""
    labels = [each.weights for each in base.encoder_settings]
    random = any(label.startswith("random") for label in labels)
    weights = " with random weights" if random else ""
    sizes = "toy sizes, whose ratios are not those of the published ones" if base.architecture else "published sizes"
    about = f"{', '.join(base.encoders)}{weights}, {sizes}; one thread a worker"
    sections = (
        Section(
            title="Extraction against the number of encoders",
            columns=(
                Column(name="encoders", unit="count"),
                Column(name="workers"),
                Column(name="a clip", unit="seconds"),
                Column(name="before the first", unit="seconds"),
            ),
            rows=tuple(extractions),
            notes=(
                "Elapsed seconds of a further clip, by extractions of all clips and of a quarter, and what is left"
                f" before the first: starting workers and loading encoders. Shortest of {rounds}; workers share the"
                f" {os.cpu_count()} cores of this machine with whatever else runs on it.",
            ),
            plot=Plot(x="encoders", y="a clip", lines=("workers",)),
        ),
        Section(
            title="Training step against the number of encoders",
            columns=(
                Column(name="encoders", unit="count"),
                Column(name="tokens"),
                Column(name="a step", unit="seconds"),
            ),
            rows=tuple(steps),
            notes=("Median of the steps behind the first; the same LLM, fusion and batches.",),
            plot=Plot(x="encoders", y="a step", lines=("tokens",)),
        ),
    )
    return Document(title="Time against the number of encoders", sections=sections, footnotes=(f"Encoders: {about}.",))


if __name__ == "__main__":
    main()
