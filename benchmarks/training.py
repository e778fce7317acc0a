"""Training from a store beside the same training with nothing to read: what the data costs a step.

    python benchmarks/training.py           # 0.5 GB in a temporary folder

Both are `merv-train`'s own loop with the same model and batches: four encoders of MERV's widths on their grid of
16 x 8 x 8 (7.3 MB per clip), their projectors and fusion, and a small LLM that is trained too. One reads a store of
synthetic tokens; the floor gets tensors that are there already, without even a copy. Rounds take turns, the median
counts, and the first steps of each are left out. The promise is a ratio of at most 1.03 where cores are free to read.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from synthetic import synthetic_identity
from torch import Tensor

from featurestore import Clip, FeatureStore, StoreWriter
from featurestore.clips import Sample, Turn
from trainer.config import OptimizerConfig, TrainConfig
from trainer.data.tokens import MemoryTokens, StoreTokens, TokenSource
from trainer.loop.train import train
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs.run_record import read_metrics

GRID = (16, 8, 8)
WIDTHS = {"dinov2": 1024, "vivit": 768, "siglip": 768, "languagebind": 1024}
WARM_UP = 2  # steps


class ReadyTokens(MemoryTokens):
    """Gives the same first clips for whatever is asked: no reading, no copying."""

    def fetch(self, clip_ids: Sequence[str]) -> dict[str, Tensor]:
        return {encoder: tokens_BTHWD[: len(clip_ids)] for encoder, tokens_BTHWD in self._tokens.items()}


@click.command(context_settings={"show_default": True})
@click.option("--clips", default=64, help="Clips in the store, each asked about once per epoch.")
@click.option("--batch-size", default=8, help="Samples per step.")
@click.option("--steps", default=8, help="Steps per round, the first two of which do not count.")
@click.option("--rounds", default=3, help="Rounds of each.")
@click.option("--threads", default=1, help="Threads that compute; reading has its own.")
@click.option("--width", default=256, help="Width of the LLM, in four layers.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(clips: int, batch_size: int, steps: int, rounds: int, threads: int, width: int, as_json: bool) -> None:
    """Print seconds per step from the store and without reading, and their ratio."""
    torch.set_num_threads(threads)
    FRESH_LLMS["bench"] = FreshLLM(hidden_size=width, num_layers=4, num_heads=4, context=2048)
    config = TrainConfig(
        llm="fresh:bench",
        train_llm="full",
        optimizer=OptimizerConfig(projector_lr=1e-4, fusion_lr=1e-4, llm_lr=1e-4),
        batch_size=batch_size,
        micro_batch_size=batch_size,
        max_steps=steps,
        precision="fp32",
        log_every=1,
        checkpoint_every=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(Path(folder), config, clips, rounds)
    if as_json:
        click.echo(json.dumps(figures))
        return
    for name in ("store", "ready"):
        row = figures[name]
        click.echo(f"{name}: {row['step_s']:.3f} s per step, {row['wait_share']:.1%} of it waiting for data")
    click.echo(f"ratio: {figures['ratio']:.3f}")


def compare(folder: Path, config: TrainConfig, num_clips: int, rounds: int, grid: tuple[int, int, int] = GRID) -> dict:
    """Rounds in turn; medians over all counted steps."""
    samples = [_sample(index) for index in range(num_clips)]
    tokens = make_store(folder / "bench.zarr", num_clips, grid)
    store = StoreTokens(FeatureStore.open(folder / "bench.zarr"), list(WIDTHS))
    sources = {"store": store, "ready": ReadyTokens([sample.clip_id for sample in samples], tokens)}
    rows: dict[str, list[dict]] = {name: [] for name in sources}
    for number in range(rounds):
        for name in sorted(sources, reverse=bool(number % 2)):  # neither always comes first
            rows[name] += measure(config, samples, sources[name], folder / f"{name}-{number}")
    figures = {
        name: {
            "step_s": statistics.median(config.batch_size / row["samples_per_s"] for row in found),
            "wait_share": statistics.median(row["wait_share"] for row in found),
        }
        for name, found in rows.items()
    }
    return {**figures, "ratio": figures["store"]["step_s"] / figures["ready"]["step_s"]}


def measure(config: TrainConfig, samples: list[Sample], source: TokenSource, out: Path) -> list[dict]:
    """Metrics of the steps that count."""
    train(replace(config, seed=7), samples, source, out, quiet=True)
    return read_metrics(out)[WARM_UP:]


def make_store(path: Path, num_clips: int, grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """Clips with tokens that are smooth in time and of uneven channel scale; those of the first few, in memory."""
    writer = StoreWriter.open_or_create(path)
    rows = writer.add_clips([Clip(dataset="bench", path=f"{i:04d}.mp4", kind="video") for i in range(num_clips)])
    random, kept = np.random.default_rng(0), {}
    for encoder, width in WIDTHS.items():
        group = writer.ensure_group(
            "video", synthetic_identity(encoder, grid, width), batch_shape=1, weights_label="random:0"
        )
        gain = random.lognormal(size=width)
        values = []
        for block in group.missing_blocks():
            task = group.begin(block)
            for row in (row for row, _ in rows if row in task.rows):
                drift = 0.3 * random.normal(size=(*grid, width)).cumsum(axis=0)
                tokens = ((random.normal(size=(1, 1, 1, width)) + drift) * gain).astype(np.float16)
                task.add(row, {"tokens": tokens}, media_sha256=None, decoder=None)
                values.append(tokens)
            task.commit()
        kept[encoder] = torch.from_numpy(np.stack(values))
    writer.publish_snapshot()
    return kept


def _sample(index: int) -> Sample:
    return Sample(
        sample_id=f"{index:04d}",
        clip_id=f"bench/{index:04d}.mp4",
        turns=(
            Turn(role="human", text="<video>\nWhat happens in this video, and in what order does it happen?"),
            Turn(role="gpt", text="A person opens a door, walks through a room and sits down at a table."),
        ),
        stage="finetune",
        source="bench",
    )


if __name__ == "__main__":
    main()
