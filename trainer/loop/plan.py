"""Plan: everything that is decided before the first step.

Comes in: settings, samples, a token source. Goes out: a `Plan` with the data selected, the model built with seeded
weights, and the batches of every step known. A dry run stops here and prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from featurestore.clips import Sample
from mervcache.console import say
from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.data.batches import Batches, TrainingData, select
from trainer.data.tokens import TokenSource
from trainer.loop.initialise import Loaded, load_parts, read_origin, starting_llm
from trainer.loop.memory import memory_by_part
from trainer.model.build import Built, build, count_parameters, new_llm, trained_encoders
from trainer.model.standardise import Moments
from trainer.runs.rebuild import resumed_llm
from trainer.runs.record import RunRecord, software_versions

STANDARDISE_CLIPS = 512  # clips whose tokens give the standardisation's constants
STANDARDISE_BATCH = 32  # clips in memory at once
MIN_TEXT_TOKENS = 32  # a short question with its answer: a run whose context has no room for them is refused


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is decided before the first step."""

    config: TrainConfig
    data: TrainingData
    built: Built
    batches: Batches
    record: RunRecord
    loaded: Loaded | None = None  # what was taken over from another run


def make_plan(
    config: TrainConfig,
    samples: Sequence[Sample],
    source: TokenSource,
    *,
    store: str = "",
    run: Path | None = None,
    words: Sequence[str] = (),
    rank: int = 0,
    num_ranks: int = 1,
) -> Plan:
    """Select the data and build the model.

    `run` is a folder that is being resumed; a fresh LLM knows `words` besides those of the samples.
    """
    data = select(samples, source, config)
    built, loaded = _build(config, data, source, run, words)
    if loaded and rank == 0:
        say(loaded.message)
    _check_room(built)
    if rank == 0 and (said := _cut_by_context(built, data.samples)):
        say(said)
    batches = Batches(
        data,
        source,
        built.renderer,
        config,
        num_visual_tokens=built.model.num_visual_tokens,
        context=built.model.context,
        rank=rank,
        num_ranks=num_ranks,
    )
    record = _record(store, data, source, built, num_steps=batches.num_steps, loaded=loaded)
    return Plan(config=config, data=data, built=built, batches=batches, record=record, loaded=loaded)


def _build(
    config: TrainConfig, data: TrainingData, source: TokenSource, run: Path | None, words: Sequence[str]
) -> tuple[Built, Loaded | None]:
    """The model with seeded weights, or with those of another run; a resumed run's come from its checkpoint later."""
    origin = read_origin(config.init) if config.init and run is None else None
    if run is not None:
        llm = resumed_llm(config, run)
    elif origin is not None:
        llm = starting_llm(origin, config, data.samples, words)
    else:
        llm = new_llm(config, data.samples, words)
    built = build(config, source.shapes, llm)
    built.model.join(trained_encoders(config, source.trained))
    return built, load_parts(origin, built, source.shapes) if origin else None


def _record(
    store: str, data: TrainingData, source: TokenSource, built: Built, *, num_steps: int, loaded: Loaded | None
) -> RunRecord:
    """What the run's folder says about its data and its model."""
    model = built.model
    return RunRecord(
        store=store,
        data_digest=data.digest,
        num_samples=len(data.samples),
        dropped=data.dropped,
        shapes={encoder: source.shapes[encoder] for encoder in model.encoders},
        parameters=count_parameters(model),
        num_visual_tokens=model.num_visual_tokens,
        num_steps=num_steps,
        snapshot=source.snapshot,
        started_from=loaded.message if loaded else "",
        encoders={encoder: source.facts[encoder] for encoder in model.encoders if encoder in source.facts},
        software=software_versions(),
        tokens="from cache" if source.live is None else "end to end",
        live=source.live,
    )


def _check_room(built: Built) -> None:
    """Refuse visual tokens that leave no room for text, before the first step finds it out."""
    config, visual, context = built.config, built.model.num_visual_tokens, built.model.context
    least = min(MIN_TEXT_TOKENS, config.max_text_tokens)
    if context is None or context - visual >= least:
        return
    raise UserError(
        f"{visual:,} visual tokens (fusion {config.fusion.name} of {len(built.model.encoders)} encoders) leave"
        f" {max(0, context - visual)} of the LLM's context of {context:,} to text, and a short question with its answer"
        f" takes {least}; choose a fusion that mixes encoders, a smaller projector.grid, fewer encoders or an LLM with"
        " a longer context; exceed_context: true goes beyond it, where positions are rotary"
    )


def _cut_by_context(built: Built, samples: Sequence[Sample]) -> str:
    """What to say where the context cuts texts, not the user's own limit; seen by the text with the most letters."""
    limit, model = built.renderer.max_tokens, built.model
    if limit == built.config.max_text_tokens:
        return ""
    longest = max(samples, key=lambda sample: sum(len(turn.text) for turn in sample.turns))
    if not built.renderer(longest.turns).is_cut:
        return ""
    return (
        f"texts are cut at {limit:,} tokens: of the LLM's context of {model.context:,}, {model.num_visual_tokens:,} are"
        " visual tokens; --dry-run counts the texts"
    )


def describe(plan: Plan) -> dict[str, Any]:
    """What a dry run tells: sizes, lengths, counts and bytes, after rendering every sample."""
    order, config = plan.batches.order, plan.config
    rendered = [plan.batches.rendered(index) for index in range(len(plan.data.samples))]
    lengths = sorted(len(sample.input_ids) for sample in rendered)
    return {
        "samples": len(rendered),
        "dropped": dict(plan.data.dropped),
        "text_limit": plan.built.renderer.max_tokens,  # by max_text_tokens or by the context
        "cut": sum(sample.is_cut for sample in rendered),
        "without_answer": sum(sample.num_supervised == 0 for sample in rendered),  # behind the cut: they train nothing
        "samples_per_epoch": order.num_per_epoch,  # by the sources' weights
        "steps": plan.batches.num_steps,
        "unread": order.unread(config.epochs) if config.max_steps is None else {},  # at the end they fill no batch
        "batch_size": config.batch_size,
        "visual_tokens": plan.record.num_visual_tokens,
        "text_tokens": {"median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "longest_sequence": lengths[-1] + plan.record.num_visual_tokens,
        "context": plan.built.model.context,
        "parameters": plan.record.parameters,
        "memory_bytes": memory_by_part(plan.built, plan.record.shapes, lengths[-1]),
        "encoders": {encoder: [*shape.grid, shape.width] for encoder, shape in plan.record.shapes.items()},
        "data_digest": plan.data.digest,
    }


@torch.no_grad()
def fit_standardisation(plan: Plan, source: TokenSource) -> None:
    """Measure the constants of every standardising projector on the first clips of epoch 0.

    Projectors of another run keep the constants that their weights were trained with.
    """
    model = plan.built.model
    known = plan.loaded.names if plan.loaded else set()
    standardised = [
        (encoder, projector)
        for index, (encoder, projector) in enumerate(zip(model.encoders, model.projectors, strict=True))
        if projector.standardise and f"projectors.{index}.standardise.mean_D" not in known
    ]
    if not standardised:
        return
    moments = [Moments() for _ in standardised]
    clips = _first_clips(plan)
    for start in range(0, len(clips), STANDARDISE_BATCH):
        tokens = model.encode(source.fetch(clips[start : start + STANDARDISE_BATCH]))
        for (encoder, projector), sums in zip(standardised, moments, strict=True):
            sums.add(projector.resample(tokens[encoder]))
    for (_, projector), sums in zip(standardised, moments, strict=True):
        projector.standardise.fit(sums)


def _first_clips(plan: Plan) -> list[str]:
    """Distinct clips in the order of the first epoch, so a run's constants follow from its seed and data."""
    order = plan.batches.order
    steps = range(-(-order.num_per_epoch // order.batch_size))
    samples = (plan.data.samples[index] for step in steps for index in order.batch(step))
    clips = (sample.clip_id for sample in samples if sample.clip_id is not None)
    return list(dict.fromkeys(islice(clips, 8 * STANDARDISE_CLIPS)))[:STANDARDISE_CLIPS]
