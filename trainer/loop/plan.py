"""Plan: everything that is decided before the first step.

Comes in: settings, samples, a token source. Goes out: a `Plan` with the data selected, the model built with seeded
weights, and the batches of every step known. A dry run stops here and prints it.

Memory: what one process of a run will hold on its device, by part, before anything is trained.

Comes in: a model, the shapes of its tokens and the longest text. Goes out: bytes by part. Parameters, gradients and
moments are counted, tokens follow from the grids, activations are a rough formula that is said beside the number: it is
there to tell 10 GB from 100 GB, not 10 from 11. Under FSDP parameters, gradients and moments are divided by the number
of processes.

B samples of a micro-batch, S sequence length, N visual tokens, M LLM width, L text length, V vocabulary, E encoders.

Validate: the held-out samples of a run while it trains: accuracy on questions, and loss by modality.

Comes in: the samples of a store, of which a run's `eval_split` was not trained on. Goes out: a flat row of metrics:

    val_loss                             mean over all supervised tokens
    val_loss_video, _image, _text        the same by what the sample is about, where there are such samples
    val_accuracy, val_chance             on those of the samples that have options, where there are some

Under the caption prompt the model is shown no question: captions of the run's own stage are held out, nothing is asked.

At most `eval_limit` samples and as many questions are chosen by their ids, the same every time. Every rank scores a
share and all get the same sums; ranks with less to do repeat something and do not count it, because under FSDP a
forward is work for all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from featurestore.clips import Sample
from mervcache.console import echo
from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.data.batches import Batches, TrainingData, select
from trainer.data.order import derive_seed
from trainer.data.prompts import reason_to_refuse
from trainer.data.tokens import TokenShape, TokenSource
from trainer.model.multiple_choice import FIRST_CLIPS, answer_batch, batch_of, is_whole, showable
from trainer.model.projectors import Moments
from trainer.model.video_llm import Built, build, count_parameters, new_llm, trained_encoders
from trainer.runs.initialise import Loaded, load_parts, read_origin, starting_llm
from trainer.runs.load import resumed_llm
from trainer.runs.run_record import RunRecord, software_versions

NUM_MOMENTS = 2  # AdamW's
FLOAT_BYTES = 4
# arXiv 2205.05198, table 2: a layer keeps 34 bytes per position and channel in 16 bits, without the matrix of attention
# scores, which fused attention does not keep; with checkpointing 2, and the whole of the layer that is being redone.
LAYER_BYTES, CHECKPOINT_BYTES = 34, 2
FORMULA = (
    "{layers} B S M + 4 x 3 B L V + 4 x 2 B E N M bytes; B {B}, S {S}, M {M}, L {L}, V {V}, E {E}, N {N}"
    " (layers as arXiv 2205.05198, table 2; logits, their gradient and a copy; visual tokens before and behind fusion)"
)


def memory_by_part(built: Built, shapes: Mapping[str, TokenShape], longest_text: int) -> dict[str, Any]:
    """Bytes by part, their sum, and the formula of the activations."""
    model = built.model
    trained = [p for p in model.parameters() if p.requires_grad]
    activations, formula = _activations(built, longest_text)
    parts = {
        "parameters": sum(_bytes(p) for p in model.parameters()),
        "gradients": sum(_bytes(p) for p in trained),
        "moments": NUM_MOMENTS * sum(_bytes(p) for p in trained),
        "tokens": _tokens(built.config, shapes),
        "activations": activations,
    }
    return {**parts, "total": sum(parts.values()), "activations_formula": formula}


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _tokens(config: TrainConfig, shapes: Mapping[str, TokenShape]) -> int:
    """Tokens of a micro-batch in which every sample has a clip of its own; projectors read them in float32."""
    per_clip = sum((prod(shape.grid) + shape.grid[0] * shape.num_prefix) * shape.width for shape in shapes.values())
    return config.micro_batch_size * per_clip * FLOAT_BYTES


def _activations(built: Built, longest_text: int) -> tuple[int, str]:
    config, llm = built.config, built.model.llm
    size = {
        "B": config.micro_batch_size,
        "S": longest_text + built.model.num_visual_tokens,
        "M": llm.get_input_embeddings().weight.shape[1],
        "L": longest_text,
        "V": llm.config.vocab_size,
        "E": len(built.model.projectors),
        "N": built.model.num_visual_tokens,
    }
    scale = 1 if config.precision == "bf16" else 2  # the paper's figures are for 16 bits
    num_layers = llm.config.num_hidden_layers
    per_layer = CHECKPOINT_BYTES if config.activation_checkpointing else LAYER_BYTES
    layers = scale * (per_layer * num_layers + (LAYER_BYTES if config.activation_checkpointing else 0))
    b, m = size["B"], size["M"]
    in_layers = layers * b * size["S"] * m
    logits = FLOAT_BYTES * 3 * b * size["L"] * size["V"]
    visual = FLOAT_BYTES * 2 * b * size["E"] * size["N"] * m
    return in_layers + logits + visual, FORMULA.format(layers=layers, **size)


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
        echo(loaded.message)
    _check_room(built)
    if rank == 0 and (said := _cut_by_context(built, data.samples)):
        echo(said)
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
        "unread": order.num_dropped(config.epochs) if config.max_steps is None else {},  # at the end they fill no batch
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


MODALITIES = ("video", "image", "text")


class Validation:
    """What is asked, chosen before the first step; calling it measures the model as it stands."""

    def __init__(self, plan: Plan, samples: Sequence[Sample], source: TokenSource, accelerator: Accelerator) -> None:
        self.built, self.config, self.source, self.accelerator = plan.built, plan.config, source, accelerator
        held_out = heldout_samples(samples, source, plan.config, has_visual=plan.built.model.has_visual)
        self.samples = held_out[: self.config.eval_limit]
        self.questions = self._questions(held_out)
        stills = source.stills({sample.clip_id for sample in self.samples if sample.clip_id is not None})
        self.modality = {sample.sample_id: modality(sample, stills) for sample in self.samples}
        if not held_out and accelerator.is_main_process:
            said = f"no caption of split {self.config.eval_split!r}: stage {self.config.stage} is not validated"
            echo(said)

    def _questions(self, held_out: Sequence[Sample]) -> list[Sample]:
        """Those that are read to their end."""
        if self.config.prompt == "caption":
            return []
        asked = (sample for sample in held_out if sample.options and is_whole(self.built, sample))
        return list(islice(asked, self.config.eval_limit))

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The row of metrics, equal on every rank, empty if nothing is held out. Leaves the model evaluating."""
        if not self.samples:
            return {}
        self.built.model.eval()
        # By modality: loss and supervised tokens; then right answers and the chance of them.
        sums = torch.zeros(2 * len(MODALITIES) + 2, dtype=torch.float64)
        self._share(self.samples, self._losses, sums[:-2])
        self._share(self.questions, self._answers, sums[-2:])
        # float32, which every device has: a few hundred sums lose nothing that is shown
        sums = self.accelerator.reduce(sums.float().to(self.accelerator.device), "sum").tolist()
        return self._row(sums[: len(MODALITIES)], sums[len(MODALITIES) : -2], sums[-2], sums[-1])

    def _row(self, losses: list[float], counts: list[float], right: float, chance: float) -> dict[str, float]:
        by_name = zip(MODALITIES, losses, counts, strict=True)
        row = {"val_loss": sum(losses) / max(sum(counts), 1)}
        row |= {f"val_loss_{name}": loss / count for name, loss, count in by_name if count}
        if self.questions:
            row |= {"val_accuracy": right / len(self.questions), "val_chance": chance / len(self.questions)}
        return row

    def _share(self, samples: Sequence[Sample], measure: Callable[[Sequence[Sample]], Tensor], into: Tensor) -> None:
        """Add up what this rank measures on its part of the samples, in as many forwards as every other rank."""
        size, ranks = self.config.micro_batch_size, self.accelerator.num_processes
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        for first in range(0, len(parts), ranks):
            mine = first + self.accelerator.process_index
            measured = measure(parts[min(mine, len(parts) - 1)])
            into += measured if mine < len(parts) else 0.0

    def _losses(self, samples: Sequence[Sample]) -> Tensor:
        """Summed losses of each modality, then their supervised tokens."""
        batch = batch_of(self.built, samples, self.source)
        with self.built.autocast(self.accelerator.device):
            losses_B = self.built.model.sample_losses(batch.to(self.accelerator.device)).double().cpu()
        kinds = [MODALITIES.index(self.modality[sample.sample_id]) for sample in samples]
        sums = torch.zeros(2, len(MODALITIES), dtype=torch.float64)
        sums.index_add_(1, torch.tensor(kinds), torch.stack([losses_B, batch.supervised_B.double()]))
        return sums.flatten()

    def _answers(self, questions: Sequence[Sample]) -> Tensor:
        """Right answers, and how many a guess would get."""
        answers = answer_batch(self.built, questions, self.source, self.accelerator.device)
        right = sum(answer.predicted == answer.correct for answer in answers)
        return torch.tensor([right, sum(1 / answer.num_options for answer in answers)], dtype=torch.float64)


def heldout_samples(
    samples: Sequence[Sample], source: TokenSource, config: TrainConfig, *, has_visual: bool
) -> list[Sample]:
    """Those of the eval split that can be shown to the model, in an order that follows from their ids alone."""
    wanted = [sample for sample in samples if sample.split == config.eval_split and _changes(sample, config)]
    wanted = showable(wanted, source, has_visual=has_visual)
    if not wanted and config.prompt != "caption":  # which is a stage of a chain, and few stores hold captions back
        found = ", ".join(sorted({sample.split for sample in samples})) or "none"
        raise UserError(
            f"eval_every is {config.eval_every}, but no sample of split {config.eval_split!r} has tokens; splits found:"
            f" {found}; choose another eval_split, leave eval_every out, or, if the store was made with --limit"
            f" ({FIRST_CLIPS}), extract again without it"
        )
    return sorted(wanted, key=lambda sample: (derive_seed("validation", sample.sample_id), sample.digest))


def _changes(sample: Sample, config: TrainConfig) -> bool:
    """Whether training can change what the model makes of a sample: a frozen LLM knows about text what it knows."""
    if sample.clip_id is None and (config.train_llm == "none" or config.prompt == "caption"):
        return False
    if config.prompt == "caption" and sample.stage != config.stage:
        return False
    return reason_to_refuse(config.prompt, sample.turns) is None


def modality(sample: Sample, stills: set[str]) -> str:
    """What a sample is about."""
    if sample.clip_id is None:
        return "text"
    return "image" if sample.clip_id in stills else "video"
