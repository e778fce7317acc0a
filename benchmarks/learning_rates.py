"""Which learning rates suit projectors and fusion under a frozen LLM.

    make smollm2
    merv-pipeline extract --config pipeline/demo.yaml --store features/demo.zarr
    python benchmarks/learning_rates.py --store features/demo.zarr --llm models/smollm2-135m

The clips are the demo's: drawn, with known answers, four options per question, every answer equally often, so that a
model which does not look scores 0.25. First the projectors' rate is varied with the fusion's equal to it, then the
fusion's with the projectors' at the best of the first (by validation loss). Everything else is recipe merv-frozen but
for what --steps and its neighbours say. Every run has the same seed, samples and order. Validation loss is the mean
over held-out questions of the cross-entropy per token of the right answer. A run that is done is not done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from mervcache.config import overlay
from trainer.config import TrainConfig
from trainer.recipes import get_recipe

EDGE = 10  # steps at the end of a run whose training losses are averaged


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of the sweep; small and picklable."""

    config: TrainConfig
    store: str
    out: str
    questions: int


@click.command(context_settings={"show_default": True})
@click.option("--store", default="features/demo.zarr", type=click.Path(exists=True), help="Store of the demo's clips.")
@click.option("--llm", default="models/smollm2-135m", help="Frozen LLM: folder or Hub id.")
@click.option("--projector-rates", default="2e-5,2e-4,1e-3,4e-3", help="First, with the fusion at the same rate.")
@click.option("--fusion-rates", default="2e-5,1e-2", help="Then, with the projectors at the best rate.")
@click.option("--steps", default=256, type=click.IntRange(min=EDGE), help="Steps of each run.")
@click.option("--batch-size", default=8, help="Samples per step.")
@click.option("--grid", default="4,4,4", help="T,H,W of the visual tokens.")
@click.option("--standardise/--no-standardise", help="Channels to mean 0 and deviation 1 before the projectors.")
@click.option("--prompt", default="chat_template", help="Prompt format.")
@click.option("--questions", default=120, help="Held-out questions asked.")
@click.option("--jobs", default=len(os.sched_getaffinity(0)), help="Runs side by side, one torch thread each.")
@click.option("--out", default="runs/learning-rates", type=click.Path(path_type=Path), help="Folder of the runs.")
def main(
    store: str, projector_rates: str, fusion_rates: str, jobs: int, questions: int, out: Path, **settings: Any
) -> None:
    """Sweep rates and write OUT/table.md."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # read where the runs import torch

    def task(projector_lr: float, fusion_lr: float) -> Task:
        config = config_of(settings, projector_lr=projector_lr, fusion_lr=fusion_lr)
        name = f"projector-{projector_lr:g}-fusion-{fusion_lr:g}"
        return Task(config=config, store=store, out=str(out / name), questions=questions)

    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        baseline = pool.submit(measure_text_only, task(0.0, 0.0))
        rows = list(pool.map(measure, [task(rate, rate) for rate in parse_rates(projector_rates)]))
        best = min(rows, key=lambda row: row["validation_loss"])["projector_lr"]
        rows += pool.map(measure, [task(best, rate) for rate in parse_rates(fusion_rates) if rate != best])
        text = table(baseline.result(), rows)
    (out / "table.md").write_text(text)
    click.echo(text)


def config_of(settings: Mapping[str, Any], *, projector_lr: float, fusion_lr: float) -> TrainConfig:
    """Recipe merv-frozen at a size for two CPU cores."""
    changes = {
        "llm": settings["llm"],
        "prompt": settings["prompt"],
        "projector": {
            "grid": [int(side) for side in settings["grid"].split(",")],
            "standardise": settings["standardise"],
        },
        "optimizer": {"projector_lr": projector_lr, "fusion_lr": fusion_lr},
        "batch_size": settings["batch_size"],
        "micro_batch_size": settings["batch_size"],
        "max_steps": settings["steps"],
        "keep_checkpoints": 1,
        "by_samples": {},
    }
    return overlay(get_recipe("merv-frozen"), changes)


def parse_rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",") if rate]


def measure(task: Task) -> dict[str, Any]:
    """Train one run and ask it the held-out questions; what it said is kept beside it."""
    import torch

    from trainer.evaluate import EvaluationRequest, evaluate_run
    from trainer.loop.train import train
    from trainer.runs.run_record import read_metrics
    from trainer.sources import open_store

    torch.set_num_threads(1)
    out = Path(task.out)
    done = out / "measured.json"
    if done.exists():
        return json.loads(done.read_text())
    samples, source = open_store(task.store, task.config)
    train(task.config, samples, source, out, store=task.store, resume=True, quiet=True)
    losses = [row["loss"] for row in read_metrics(out)]
    request = EvaluationRequest(store=task.store, limit=task.questions, protocol="likelihood")
    answers = evaluate_run(out, request)["answers"]
    row = {
        "projector_lr": task.config.optimizer.projector_lr,
        "fusion_lr": task.config.optimizer.fusion_lr,
        "first_loss": losses[0],
        "training_loss": sum(losses[-EDGE:]) / EDGE,
        **judged(answers),
    }
    done.write_text(json.dumps(row))
    return row


def measure_text_only(task: Task) -> dict[str, Any]:
    """The same questions asked of the LLM as it came, without visual tokens."""
    import torch
    from frozen_llm import plain_llm

    from trainer.model.multiple_choice import answer_all, questions
    from trainer.sources import open_store

    torch.set_num_threads(1)
    samples, source = open_store(task.store, task.config)
    asked = questions(samples, source, split="heldout", has_visual=True)[: task.questions]
    answers = answer_all(plain_llm(task.config), asked, source)
    return judged([{**asdict(answer), "credit": answer.credit} for answer in answers])


def judged(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Validation loss and accuracy of a set of answers, over all and by category."""

    def accuracy(chosen: Iterable[Mapping[str, Any]]) -> float:
        hits = [answer["credit"] for answer in chosen]
        return sum(hits) / len(hits)

    categories = sorted({answer["category"] for answer in answers})
    return {
        "questions": len(answers),
        "validation_loss": -sum(answer["scores"][answer["correct"]] for answer in answers) / len(answers),
        "accuracy": accuracy(answers),
        "by_category": {name: accuracy(a for a in answers if a["category"] == name) for name in categories},
    }


def table(baseline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line per run, the LLM alone first."""
    categories = list(baseline["by_category"])
    head = ["projectors", "fusion", "first loss", f"last {EDGE} steps", "validation loss", "accuracy", *categories]

    def line(rates: Sequence[str], row: Mapping[str, Any]) -> str:
        scores = [f"{row['accuracy']:.2f}", *(f"{row['by_category'][name]:.2f}" for name in categories)]
        return "| " + " | ".join([*rates, f"{row['validation_loss']:.3f}", *scores]) + " |"

    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines.append(line(["no visual tokens", "-", "-", "-"], baseline))
    for row in rows:
        rates = [f"{row['projector_lr']:g}", f"{row['fusion_lr']:g}"]
        lines.append(line([*rates, f"{row['first_loss']:.3f}", f"{row['training_loss']:.3f}"], row))
    return "\n".join([*lines, "", f"{baseline['questions']} held-out questions, chance 0.25.", ""])


if __name__ == "__main__":
    main()
