"""What visual tokens are worth to a frozen LLM: a run's loss beside that of the same LLM without them.

    python benchmarks/frozen_llm.py runs/mini

Losses are cross-entropy per supervised token. "without visual tokens" is the LLM as it came, on the same samples with
the same prompt. A run's gain over it has two parts: visual tokens of any clip teach the LLM how answers look here (as a
learnt prompt would), and those of the right clip say what is to be seen. "with another clip" asks the trained run with
the clip of the next sample that has another: what it loses there is what it takes from the right one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from featurestore.clips import Sample
from trainer.config import TrainConfig
from trainer.data.batches import select
from trainer.data.collate import Batch, collate, make_batch
from trainer.data.prompts import Renderer
from trainer.data.tokens import TokenSource
from trainer.model.video_llm import Built, VideoLLM, new_llm
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics
from trainer.sources import open_store

BATCH = 8  # samples per forward
EDGE = 5  # steps whose losses are averaged at either end of a run


@click.command(context_settings={"show_default": True})
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=click.IntRange(min=2), default=256, help="Training samples that the losses are taken of.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch.  [default: one per core]")
def main(run: Path, limit: int, threads: int | None) -> None:
    """Print a trained run's losses beside those of its LLM alone, as JSON."""
    if threads:
        torch.set_num_threads(threads)
    loaded = load_run(run)
    samples, source = open_store(loaded.record.store, loaded.built.config)
    chosen = [s for s in select(samples, source, loaded.built.config).samples if s.clip_id is not None][:limit]
    own = [sample.clip_id for sample in chosen]
    rows = read_metrics(run)
    result = {
        "steps": len(rows),
        f"loss of the first {EDGE} steps": mean_loss(rows[:EDGE]),
        f"loss of the last {EDGE} steps": mean_loss(rows[-EDGE:]),
        "samples below": len(chosen),
        "without visual tokens": text_only_loss(plain_llm(loaded.built.config), chosen),
        "with the clip": visual_loss(loaded.built, chosen, own, source),
        "with another clip": visual_loss(loaded.built, chosen, swapped(own), source),
    }
    click.echo(json.dumps(result, indent=1))


def plain_llm(config: TrainConfig) -> Built:
    """The LLM of a run as it came, with the run's prompt and nothing in front of it."""
    llm = new_llm(config, ())
    renderer = Renderer(config.prompt, llm.tokenizer, max_tokens=config.max_text_tokens)
    return Built(model=VideoLLM(llm.model, {}, None).eval(), llm=llm, renderer=renderer, config=config)


def text_only_loss(built: Built, samples: Sequence[Sample]) -> float:
    """Loss per supervised token without any visual token."""
    rendered = [built.renderer(sample.turns) for sample in samples]
    parts = [rendered[start : start + BATCH] for start in range(0, len(rendered), BATCH)]
    return loss_of(built, [collate(part, [-1] * len(part), {}, num_visual_tokens=0) for part in parts])


def visual_loss(built: Built, samples: Sequence[Sample], clips: Sequence[str], source: TokenSource) -> float:
    """Loss per supervised token, each sample shown the clip at its place."""
    rendered = [built.renderer(sample.turns) for sample in samples]
    model = built.model
    batches = (
        make_batch(
            rendered[start : start + BATCH],
            clips[start : start + BATCH],
            source,
            model.num_visual_tokens,
            model.context,
        )
        for start in range(0, len(rendered), BATCH)
    )
    return loss_of(built, batches)


@torch.no_grad()
def loss_of(built: Built, batches: Sequence[Batch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=built.config.precision == "bf16"):
            total += float(built.model(batch))
        count += batch.num_supervised
    return total / count


def swapped(clips: Sequence[str]) -> list[str]:
    """For every place the next clip in turn that is another one."""
    turned = [*clips[1:], *clips[:1]]
    others = {clip: other for clip, other in zip(clips, turned, strict=True) if clip != other}
    return [others[clip] for clip in clips]


def mean_loss(rows: Sequence[dict]) -> float:
    return sum(row["loss"] for row in rows) / len(rows)


if __name__ == "__main__":
    main()
