"""Share of the ranks' time that is work on samples, by how a global batch is cut into micro-batches.

    python benchmarks/partition.py            # a table; seconds, no model and no GPU
    python benchmarks/partition.py --json

The rest is padding, and waiting: at the end of a step, under FSDP in every micro-batch. A position costs the same
wherever it is. Lengths are drawn, not read: text tokens from log-normal distributions that resemble the video, image
and text instructions of Video-LLaVA's mix. `merv-train --dry-run` gives the same share for your own samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import click
import numpy as np

from mervcache.console import table
from trainer.data.order import rank_shares
from trainer.data.partition import Part, partition, useful_share

TEXT_ALONE = 2
LOG_LENGTHS = (
    (5.35, 0.75),
    (4.7, 0.5),
    (6.3, 0.7),
)  # mean and deviation of log text tokens: videos, images, text alone
MIXES = {"frozen LLM": (0.86, 0.14, 0.0), "trained LLM": (0.82, 0.13, 0.05)}  # text alone trains no projector
SHORTEST, LONGEST = 20, 2048  # text tokens
TYPICAL_TEXT = 350  # text tokens of a sample in the budget


@click.command(context_settings={"show_default": True})
@click.option("--ranks", type=click.IntRange(min=1), default=8, help="Processes.")
@click.option("--batch-size", type=click.IntRange(min=1), default=128, help="Samples of a step over all ranks.")
@click.option("--micro-batch", type=click.IntRange(min=1), default=8, help="Samples of a micro-batch without a budget.")
@click.option("--steps", type=click.IntRange(min=1), default=300, help="Steps that are drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(ranks: int, batch_size: int, micro_batch: int, steps: int, as_json: bool) -> None:
    """Print useful shares by number of samples and by tokens."""
    rows = []
    for name, mix in MIXES.items():
        for visual in (1024, 256):
            budget = micro_batch * (visual + TYPICAL_TEXT)
            drawn = draw_lengths(mix, visual, batch_size, steps)
            for strategy in ("ddp", "fsdp"):
                cut = {
                    "by number": [by_number(lengths, ranks, micro_batch) for lengths in drawn],
                    "by tokens": [partition(lengths, ranks, budget) for lengths in drawn],
                }
                shares = {kind: mean_share(found, drawn, strategy == "fsdp") for kind, found in cut.items()}
                rows.append({"of": name, "visual": visual, "strategy": strategy, "token_budget": budget, **shares})
    if as_json:
        click.echo(json.dumps({"ranks": ranks, "batch_size": batch_size, "micro_batch": micro_batch, "cases": rows}))
        return
    shown = [
        (
            row["of"],
            row["visual"],
            row["strategy"],
            row["token_budget"],
            f"{row['by number']:.1%}",
            f"{row['by tokens']:.1%}",
        )
        for row in rows
    ]
    table(("samples of", "visual tokens", "on", "token_budget", f"{micro_batch} samples", "by tokens"), shown)


def draw_lengths(mix: Sequence[float], visual: int, batch_size: int, steps: int) -> list[list[int]]:
    """Positions of every sample of every step."""
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(steps):
        kinds = random.choice(3, batch_size, p=mix)
        texts = np.stack([random.lognormal(*parameters, batch_size) for parameters in LOG_LENGTHS])
        text = texts[kinds, np.arange(batch_size)].clip(SHORTEST, LONGEST).astype(int)
        drawn.append((text + np.where(kinds == TEXT_ALONE, 0, visual)).tolist())
    return drawn


def by_number(lengths: Sequence[int], ranks: int, size: int) -> list[list[Part]]:
    """Contiguous shares, each sorted and cut into so many samples."""
    shares = [sorted(share, key=lengths.__getitem__) for share in rank_shares(range(len(lengths)), ranks)]
    return [[share[start : start + size] for start in range(0, len(share), size)] for share in shares]


def mean_share(cut: Sequence[list[list[Part]]], drawn: Sequence[list[int]], is_sharded: bool) -> float:
    """Work over time of all steps together."""
    work = [sum(lengths) for lengths in drawn]
    shares = [useful_share(found, lengths, is_sharded=is_sharded) for found, lengths in zip(cut, drawn, strict=True)]
    return sum(work) / sum(done / share for done, share in zip(work, shares, strict=True))


if __name__ == "__main__":
    main()
