"""Ratios to bare work, with floors: reading, extraction and a training step, each within one run.

    python benchmarks/floors.py             # under a minute; leaves with code 1 where a ratio is below its floor

A ratio is the time of bare work over the time of the same work through this project; 1 is the limit. Floors leave room
for busy machines: they catch work that became several times slower, not a few percent. Extraction runs toy encoders,
whose fixed costs are a large share; benchmarks/extraction.py measures full-size ones.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import extraction
import reading
import torch
import training

from pipeline.config import read_config
from pipeline.datasets import load_dataset
from trainer.config import OptimizerConfig, TrainConfig
from trainer.model.llm import FRESH_LLMS, FreshLLM

DEMO = Path(__file__).parent.parent / "pipeline/demo.yaml"
FLOORS = {
    "read, uncompressed": 0.6,
    "read, default codec": 0.6,
    "training loader, uncompressed": 0.5,
    "training loader, default codec": 0.6,
    "extraction, toy encoders": 0.3,
    "training step": 0.6,
}


@click.command()
def main() -> None:
    """Print each ratio and its floor."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    failed = False
    for name, ratio in ratios():
        is_low = ratio < FLOORS[name]
        failed |= is_low
        click.echo(f"{name:<32}{ratio:>6.2f}  floor {FLOORS[name]:.2f}{'  TOO LOW' if is_low else ''}")
    if failed:
        sys.exit(
            "a ratio to bare work is below its floor: run it again with nothing else running, then look for a cause"
        )


def ratios() -> Iterator[tuple[str, float]]:
    yield from read_ratios()
    yield "extraction, toy encoders", extraction_ratio()
    yield "training step", step_ratio()


def read_ratios() -> Iterator[tuple[str, float]]:
    """Processor time: bare checked reads over `FeatureStore.read` and over the training loader."""
    readers = {"read": "FeatureStore.read", "training loader": "training loader"}
    for codec, words in (("none", "uncompressed"), ("blosc", "default codec")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bench.zarr"
            reading.make_store(path, 2 * reading.BATCH, codec)
            best = reading.compare(path, codec, 5, only=("bare, checked", *readers.values()))
        for name, reader in readers.items():
            yield f"{name}, {words}", best["bare, checked"] / best[reader]


def extraction_ratio() -> float:
    """Wall time: decoding and forwards alone over the whole extraction."""
    config = read_config(DEMO, {"limit": 16, "kind": "video", "decode_processes": 1, "threads": 1})
    listing = load_dataset(config.dataset, config.root, kind=config.kind, limit=config.limit)
    return 1 / extraction.one_round(config, listing)["ratio"]


def step_ratio() -> float:
    """Wall time: a step on tensors in memory over the same step from a store."""
    FRESH_LLMS["floor"] = FreshLLM(hidden_size=64, num_layers=2, num_heads=2, context=2048)
    config = TrainConfig(
        llm="fresh:floor",
        train_llm="full",
        optimizer=OptimizerConfig(projector_lr=1e-4, fusion_lr=1e-4, llm_lr=1e-4),
        batch_size=4,
        micro_batch_size=4,
        max_steps=5,
        precision="fp32",
        log_every=1,
        checkpoint_every=5,
    )
    with tempfile.TemporaryDirectory() as folder:
        return 1 / training.compare(Path(folder), config, num_clips=12, rounds=2, grid=(4, 8, 8))["ratio"]


if __name__ == "__main__":
    main()
