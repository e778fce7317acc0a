"""A training step from a store beside the same step end to end: what the cache saves, and that it changes no loss.

    python benchmarks/live_step.py --root DATA                              # four full-size encoders, seeded weights
    python benchmarks/live_step.py --root DATA --config pipeline/demo.yaml  # toy sizes: every fusion in some minutes

Comes in: a dataset, by default in Video-LLaVA's layout. Its first videos are extracted into a temporary store;
`merv-train`'s own loop then trains the same model on the same batches from there, and once more with clips decoded and
encoded in the step. The first step of each is left out: later ones have been read ahead.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from pipeline.config import read_config
from pipeline.extract import extract
from trainer.config import FUSIONS, FusionConfig, OptimizerConfig, TrainConfig
from trainer.end_to_end import live_source
from trainer.loop.train import train
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs.run_record import read_metrics
from trainer.sources import open_store

RATE = 1e-4


@click.command(context_settings={"show_default": True})
@click.option("--root", required=True, help="Folder of the media and annotations.")
@click.option("--dataset", default="videollava", help="Its layout.")
@click.option(
    "--config", "config_file", type=click.Path(exists=True, dir_okay=False), help="Settings of the extraction."
)
@click.option("--fusion", "fusions", multiple=True, type=click.Choice(list(FUSIONS)), help="Repeat.  [default: all]")
@click.option("--clips", default=6, help="Videos in the store.")
@click.option("--batch-size", default=2, help="Samples per step.")
@click.option("--steps", default=3, help="Steps, the first of which does not count.")
@click.option("--threads", default=2, help="Threads that compute.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(config_file: str | None, fusions: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Print seconds per step from the store and end to end, their ratio, and the largest difference of a loss."""
    torch.set_num_threads(options["threads"])
    FRESH_LLMS["bench"] = FreshLLM(hidden_size=256, num_layers=4, num_heads=4, context=8192)
    settings = {"dataset": options["dataset"], "root": options["root"], "weights": {"": "random:0"}}
    settings |= {"kind": "video", "limit": options["clips"], "threads": options["threads"]}
    config = TrainConfig(
        llm="fresh:bench",
        train_llm="full",
        optimizer=OptimizerConfig(projector_lr=RATE, fusion_lr=RATE, llm_lr=RATE),
        batch_size=options["batch_size"],
        micro_batch_size=options["batch_size"],
        max_steps=options["steps"],
        precision="fp32",
        log_every=1,
        checkpoint_every=options["steps"],
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), config, settings, config_file, fusions or tuple(FUSIONS))
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(
            f"{row['fusion']}: {row['store_s']:.3f} s per step from the store, {row['live_s']:.3f} s end to end,"
            f" ratio {row['live_s'] / row['store_s']:.1f}, largest difference of a loss {row['difference']:g}"
        )


def compare(
    folder: Path,
    config: TrainConfig,
    settings: dict[str, Any],
    config_file: str | None,
    fusions: tuple[str, ...],
) -> list[dict[str, Any]]:
    """A row per fusion; the live encoders are loaded once for all of them."""
    store = str(folder / "bench.zarr")
    extract(read_config(config_file, {**settings, "store": store}), quiet=True)
    stored = open_store(store, config)
    rows = []
    with ExitStack() as stack:
        path = Path(config_file) if config_file else None
        live = stack.enter_context(live_source(config, settings, path, out=folder / "live"))
        for fusion in fusions:
            changed = replace(config, fusion=FusionConfig(name=fusion, query_width=256))
            steps = {}
            for name, (samples, source) in {"store": stored, "live": live}.items():
                train(changed, samples, source, folder / f"{name}-{fusion}", quiet=True)
                steps[name] = read_metrics(folder / f"{name}-{fusion}")
            pairs = zip(steps["store"], steps["live"], strict=True)
            seconds = {
                f"{name}_s": statistics.median(config.batch_size / row["samples_per_s"] for row in found[1:])
                for name, found in steps.items()
            }
            difference = max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs)
            rows.append({"fusion": fusion, **seconds, "difference": difference})
    return rows


if __name__ == "__main__":
    main()
