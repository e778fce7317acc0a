"""The plan of a run: everything that is decided before the first step, and the validation that runs between steps.

A dry run stops at the plan and prints `describe`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from heapq import nlargest
from itertools import islice
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from featurestore.clips import Sample
from mervcache.console import ProgressLine, log_while_running
from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.data.batches import EXCLUDED, Batches, TrainingData, samples_per_epoch, select
from trainer.data.order import derive_seed
from trainer.data.partition import Limit, useful_share
from trainer.data.prompts import Rendered, num_placeholders, reason_to_refuse
from trainer.data.rendered_cache import RenderedCache, renderer_key
from trainer.data.tokens import TokenSource
from trainer.loop.memory import NUM_MOMENTS, ONE_PROCESS, Device, fit, memory_by_part
from trainer.loop.sizes import fit_to_samples, size_warnings
from trainer.model.llm import LoadedLLM, is_checkpointed
from trainer.model.multiple_choice import FIRST_CLIPS, answer_batch, batch_of, is_whole, showable
from trainer.model.open_ended import is_open_question
from trainer.model.projectors import Moments
from trainer.model.video_llm import Built, build, count_parameters, new_llm, trained_encoders
from trainer.runs.checkpoint import model_weights
from trainer.runs.initialise import Loaded, load_parts, read_origin, starting_llm
from trainer.runs.load import resumed_llm
from trainer.runs.run_record import RunRecord, software_versions

STANDARDISE_CLIPS = 512  # clips whose tokens give the standardisation's constants
STANDARDISE_BATCH = 32  # clips in memory at once
NUM_LONGEST = 64  # samples with the most characters, one of which has the most tokens
MEASURED_STEPS = 50  # whose batches give the useful share
MIN_TEXT_TOKENS = 32  # a short question with its answer: a run whose context has less for text is refused
QUESTIONS_SPLIT = "heldout"  # the default of `merv-eval run --split`
MODALITIES = ("video", "image", "text")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is decided before the first step."""

    config: TrainConfig
    data: TrainingData
    built: Built
    batches: Batches
    record: RunRecord
    rendered: RenderedCache  # what the batches render samples with
    loaded: Loaded | None = None  # what was loaded from another run
    device: Device = ONE_PROCESS


def make_plan(
    config: TrainConfig,
    samples: Sequence[Sample],
    source: TokenSource,
    *,
    store: str = "",
    run: Path | None = None,
    words: Sequence[str] = (),
    llm: LoadedLLM | None = None,
    rank: int = 0,
    device: Device = ONE_PROCESS,
    limit: Limit | None = None,
    llm_device: torch.device | None = None,
) -> Plan:
    """Select the data and build the model, with seeded weights or those of the run that `config.init` names.

    `run` is a folder that is being resumed: its weights come from its checkpoint later. `words` are texts whose words a
    fresh LLM knows besides those of the samples. `llm` is the config's LLM where it is loaded already and not trained.
    The plan's config has what was chosen to fit the `device`; `limit` is what a run that ran out of memory had come to.
    An LLM that is not trained is read straight onto `llm_device`. Raises UserError for data or sizes that cannot be
    trained on.
    """
    data = select(samples, source, config)
    if data.excluded and rank == 0:
        (logger.info if EXCLUDED in data.dropped else logger.warning)(data.excluded)
    config = _sized(config, data.samples, device, is_first_rank=rank == 0)
    origin = read_origin(config.init) if config.init and run is None else None
    with log_while_running(f"loading {config.llm}", quiet=llm is not None or rank != 0):
        if llm is not None:
            pass
        elif run is not None:
            llm = resumed_llm(config, run, llm_device)
        elif origin is not None:
            llm = starting_llm(origin, config, data.samples, words, llm_device)
        else:
            llm = new_llm(config, data.samples, words, llm_device)
        built = build(config, source.shapes, llm)
    model = built.model
    model.join(trained_encoders(config, source.trained))
    loaded = load_parts(origin, built, source) if origin else None
    if loaded and rank == 0:
        logger.info(loaded.message)
    if model.padding.keeps_mask and rank == 0:
        logger.info(f"batches keep their attention mask: {model.padding.reason}")
    built.renderer.check_readable(samples)
    _check_context(built, data.samples, is_first_rank=rank == 0)
    if device.memory is not None:
        longest_text = max(map(len, (text.input_ids for text in _longest_texts(built, data.samples))))
        with log_while_running("measuring memory", quiet=rank != 0):
            built = fit(built, source.shapes, longest_text, device, is_first_rank=rank == 0)
    config = built.config
    # A fresh tokenizer is another one in every run, and quick.
    key = None if config.has_fresh_llm else renderer_key(built.renderer)
    rendered = RenderedCache(built.renderer, key, writes=rank == 0)
    batches = Batches(
        data,
        source,
        rendered,
        config,
        num_visual_tokens=model.num_visual_tokens,
        context=model.context,
        leaves_out_masked=model.fusion is not None and model.fusion.leaves_out_masked,
        rank=rank,
        num_ranks=device.num_processes,
    )
    if limit is not None:
        batches.limit = limit
    record = RunRecord(
        store=store,
        data_digest=data.digest,
        num_samples=len(data.samples),
        dropped=data.dropped,
        shapes={encoder: source.shapes[encoder] for encoder in model.encoders},
        parameters=count_parameters(model),
        num_visual_tokens=model.num_visual_tokens,
        num_steps=batches.num_steps,
        snapshot=source.snapshot,
        started_from=loaded.message if loaded else "",
        encoders={encoder: source.facts[encoder] for encoder in model.encoders if encoder in source.facts},
        software=software_versions(),
        tokens="from cache" if source.live is None else "end to end",
        live=source.live,
        encoder_order=model.encoders,
        padding=asdict(model.padding),
        num_questions=_num_questions(samples, source, has_visual=model.has_visual),
    )
    return Plan(
        config=config,
        data=data,
        built=built,
        batches=batches,
        record=record,
        rendered=rendered,
        loaded=loaded,
        device=device,
    )


def _sized(config: TrainConfig, samples: Sequence[Sample], device: Device, *, is_first_rank: bool) -> TrainConfig:
    """The settings with what follows from the number of samples, which is reported."""
    if not config.by_samples:
        return config
    sized = fit_to_samples(config, samples_per_epoch(samples, config), device.num_processes)
    optimizer = sized.optimizer
    if is_first_rank and replace(sized, by_samples=config.by_samples) != config:
        logger.info(
            f"sizes for {len(samples):,} samples: --batch-size {sized.batch_size}, --epochs {sized.epochs:g}, rates"
            f" {optimizer.projector_lr:g} of projectors and {optimizer.fusion_lr:g} of the fusion"
        )
    return sized


def _num_questions(samples: Sequence[Sample], source: TokenSource, *, has_visual: bool) -> int:
    held = [sample for sample in samples if sample.split == QUESTIONS_SPLIT]
    asked = [sample for sample in held if sample.options or is_open_question(sample)]
    return len(showable(asked, source, has_visual=has_visual))


def _check_context(built: Built, samples: Sequence[Sample], *, is_first_rank: bool) -> None:
    """Refuse visual tokens that leave too little of the LLM's context to text; report where the context cuts texts."""
    config, visual, context = built.config, built.most_visual_tokens, built.model.context
    least = min(MIN_TEXT_TOKENS, config.max_text_tokens)
    if context is not None and context - visual < least:
        raise UserError(
            f"{visual:,} visual tokens (fusion {config.fusion.name} of {len(built.model.encoders)} encoders) leave"
            f" {max(0, context - visual)} of the LLM's context of {context:,} to text, and a short question with its"
            f" answer takes {least}; choose a fusion that mixes encoders, a smaller projector.grid, fewer encoders or"
            " an LLM with a longer context; exceed_context: true goes beyond it, where positions are rotary"
        )
    limit = built.renderer.max_tokens
    if not is_first_rank or limit == config.max_text_tokens:  # the second: only the user's own limit cuts
        return
    if any(text.is_cut for text in _longest_texts(built, samples)):
        logger.info(
            f"texts are cut at {limit:,} tokens: of the LLM's context of {context:,}, {visual:,} are visual tokens;"
            " --dry-run counts the texts"
        )


def _longest_texts(built: Built, samples: Sequence[Sample]) -> list[Rendered]:
    """The texts of the samples with the most characters: rendering them all would take minutes."""
    longest = nlargest(NUM_LONGEST, samples, key=lambda sample: sum(len(turn.text) for turn in sample.turns))
    return [built.renderer(sample.turns, has_clip=sample.clip_id is not None) for sample in longest]


def describe(plan: Plan) -> dict[str, Any]:
    """The report of a dry run: sizes, lengths, counts and bytes, after rendering every sample."""
    order, config = plan.batches.order, plan.config
    rendered = [plan.batches.rendered(index) for index in range(len(plan.data.samples))]
    plan.rendered.flush()
    lengths = sorted(len(sample.input_ids) for sample in rendered)
    return {
        "samples": len(rendered),
        "dropped": dict(plan.data.dropped),
        "text_limit": plan.built.renderer.max_tokens,  # by max_text_tokens or by the context
        "cut": sum(sample.is_cut for sample in rendered),
        "without_answer": sum(sample.num_supervised == 0 for sample in rendered),  # behind the cut: they train nothing
        "without_placeholder": num_without_placeholder(plan.data.samples, config),
        "samples_per_epoch": order.num_per_epoch,  # by the sources' weights
        "steps": plan.batches.num_steps,
        "unread": order.num_dropped(config.epochs) if config.max_steps is None else {},  # at the end they fill no batch
        "batch_size": config.batch_size,
        "visual_tokens": plan.record.num_visual_tokens,
        "text_tokens": {"median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "longest_sequence": lengths[-1] + plan.built.most_visual_tokens,
        "context": plan.built.model.context,
        "parameters": plan.record.parameters,
        "micro_batch": str(plan.batches.limit),
        "useful_share": useful_shares(plan),
        "activation_checkpointing": is_checkpointed(plan.built.model.llm, config),
        "device_bytes": plan.device.memory,
        "memory_bytes": memory_by_part(plan.built, plan.record.shapes, lengths[-1], plan.device),
        "checkpoints": checkpoint_sizes(plan),
        "encoders": {encoder: [*shape.grid, shape.width] for encoder, shape in plan.record.shapes.items()},
        "data_digest": plan.data.digest,
        "warnings": size_warnings(config, order.num_per_epoch, plan.batches.num_steps),
    }


def checkpoint_sizes(plan: Plan) -> dict[str, int]:
    """Bytes of a checkpoint by part, how many the run's folder keeps, and all of their bytes at the most.

    The next one is complete before an older one is removed, so that there is one more than are kept meanwhile.
    """
    config, built = plan.config, plan.built
    weights = sum(value.nbytes for value in model_weights(built.model, with_llm=built.saves_llm).values())
    optimizer = NUM_MOMENTS * sum(p.nbytes for p in built.model.parameters() if p.requires_grad)
    written = -(-plan.batches.num_steps // config.checkpoint_every)
    has_best = config.eval_every is not None
    kept = config.keep_checkpoints + has_best
    if config.checkpoint_minutes is None and not has_best:  # else others are written between
        kept = min(kept, written)
    at_most = kept if kept == written and not has_best else kept + 1
    return {"weights": weights, "optimizer": optimizer, "kept": kept, "at_most": at_most * (weights + optimizer)}


def useful_shares(plan: Plan) -> dict[str, float]:
    """Share of the ranks' time that is no padding and no waiting, of the first steps: as configured, and by tokens.

    The budget that is tried takes no more memory than the micro-batches that are configured: their samples, each of
    median length.
    """
    batches = plan.batches
    steps = range(min(batches.num_steps, MEASURED_STEPS))
    lengths = [{index: batches.length(index, step) for index in batches.order.batch(step)} for step in steps]
    limits = [batches.limit]
    if batches.limit.tokens is None and plan.config.loss == "per_token":
        typical = median(length for found in lengths for length in found.values())
        limits.append(Limit(samples=batches.limit.samples, tokens=int(batches.limit.samples * typical)))
    return {
        str(limit): fmean(
            useful_share(batches.parts(step, limit), found, is_sharded=plan.device.is_sharded)
            for step, found in zip(steps, lengths, strict=True)
        )
        for limit in limits
    }


def num_without_placeholder(samples: Sequence[Sample], config: TrainConfig) -> int:
    """Samples whose text does not say where the visual tokens go, although the config asks for that place."""
    if config.visual_position != "placeholder" or config.prompt == "caption":
        return 0
    return sum(sample.clip_id is not None and num_placeholders(sample.turns) == 0 for sample in samples)


@torch.no_grad()
def fit_standardisation(plan: Plan, source: TokenSource, *, quiet: bool = True) -> None:
    """Measure the constants of every standardising projector, at each of its grids, on the first clips of epoch 0.

    Projectors of another run keep the constants that their weights were trained with.
    """
    model, order = plan.built.model, plan.batches.order
    known = plan.loaded.names if plan.loaded else set()
    standardised = [
        (encoder, projector, tokens_per_frame, module)
        for index, (encoder, projector) in enumerate(zip(model.encoders, model.projectors, strict=True))
        for name, (tokens_per_frame, module) in projector.standardisations().items()
        if f"projectors.{index}.{name}.mean_D" not in known
    ]
    if not standardised:
        return
    # Distinct clips in the order of the first epoch, so a run's constants follow from its seed and data.
    steps = range(-(-order.num_per_epoch // order.batch_size))
    ordered = (plan.data.samples[index].clip_id for step in steps for index in order.batch(step))
    found = islice((clip_id for clip_id in ordered if clip_id is not None), 8 * STANDARDISE_CLIPS)
    clips = list(dict.fromkeys(window for clip_id in found for window in source.windows(clip_id)))[:STANDARDISE_CLIPS]
    moments = [Moments() for _ in standardised]
    with ProgressLine("measure scales", total=len(clips), unit="clips", quiet=quiet) as progress:
        for start in range(0, len(clips), STANDARDISE_BATCH):
            part = clips[start : start + STANDARDISE_BATCH]
            tokens = model.encode(source.fetch(part))
            for (encoder, projector, tokens_per_frame, _), sums in zip(standardised, moments, strict=True):
                sums.add(projector.resample(tokens[encoder], tokens_per_frame))
            progress.advance(len(part))
    for (*_, module), sums in zip(standardised, moments, strict=True):
        module.fit(sums)


class Validation:
    """Held-out samples, chosen before the first step; calling it evaluates the current weights.

    It returns a flat row of metrics, equal on every rank, empty if nothing is held out:

        val_loss                             mean over all supervised tokens
        val_loss_video, _image, _text        the same by modality, where there are such samples
        val_accuracy, val_chance             by likelihood, on the samples that have options, where there are some

    A metric that is not finite stays so: it is named in the log and never makes a checkpoint the best one.

    At most `eval_limit` samples and as many questions are chosen by their ids, the same every time. Under the caption
    prompt the model is shown no question: captions of the run's own stage are held out, and no options are scored.
    """

    def __init__(self, plan: Plan, samples: Sequence[Sample], source: TokenSource, accelerator: Accelerator) -> None:
        self.built, self.config, self.source, self.accelerator = plan.built, plan.config, source, accelerator
        held_out = heldout_samples(samples, source, plan.config, has_visual=plan.built.model.has_visual)
        self.samples = held_out[: self.config.eval_limit]
        self.questions: list[Sample] = []
        if self.config.prompt != "caption":  # questions that the context or the text limit does not cut
            questions = (sample for sample in held_out if sample.options and is_whole(self.built, sample))
            self.questions = list(islice(questions, self.config.eval_limit))
        stills = source.stills({sample.clip_id for sample in self.samples if sample.clip_id is not None})
        self.modality = {sample.sample_id: modality(sample, stills) for sample in self.samples}
        if not held_out and accelerator.is_main_process:
            logger.info(f"no caption of split {self.config.eval_split!r}: stage {self.config.stage} is not validated")

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The row of metrics. Leaves the model in evaluation mode."""
        if not self.samples:
            return {}
        self.built.model.eval()
        # By modality: loss and supervised tokens; then correct answers and how many guessing would get.
        sums = torch.zeros(2 * len(MODALITIES) + 2, dtype=torch.float64)
        self._add_share(self.samples, self._losses, sums[:-2])
        self._add_share(self.questions, self._answers, sums[-2:])
        # float32, which every device has: a few hundred sums lose nothing that is shown
        summed = self.accelerator.reduce(sums.float().to(self.accelerator.device), "sum")
        sums = cast("Tensor", summed).tolist()
        losses, counts, correct, chance = sums[: len(MODALITIES)], sums[len(MODALITIES) : -2], sums[-2], sums[-1]
        row = {"val_loss": sum(losses) / max(sum(counts), 1)}
        for name, loss, count in zip(MODALITIES, losses, counts, strict=True):
            if count:
                row[f"val_loss_{name}"] = loss / count
        if self.questions:
            row |= {"val_accuracy": correct / len(self.questions), "val_chance": chance / len(self.questions)}
        odd = [name for name, value in row.items() if not isfinite(value)]
        if odd and self.accelerator.is_main_process:
            logger.warning(f"validation: {', '.join(odd)} is not finite, so this checkpoint cannot be the best one")
        return row

    def _add_share(
        self, samples: Sequence[Sample], measure: Callable[[Sequence[Sample]], Tensor], into: Tensor
    ) -> None:
        """Add up what this rank measures on its share of the samples.

        Under FSDP a forward is work for all ranks together, so every rank does as many forwards as the others: one with
        less to do repeats a part and does not count it.
        """
        size, num_ranks = self.config.micro_batch_size, self.accelerator.num_processes
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        for first in range(0, len(parts), num_ranks):
            index = first + self.accelerator.process_index
            measured = measure(parts[min(index, len(parts) - 1)])
            into += measured if index < len(parts) else 0.0

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
        """Correct answers by likelihood, of k tied ones 1/k, and how many guessing would get."""
        answers = answer_batch(self.built, questions, self.source, self.accelerator.device)
        correct = sum(answer.credit for answer in answers)
        return torch.tensor([correct, sum(1 / answer.num_options for answer in answers)], dtype=torch.float64)


def heldout_samples(
    samples: Sequence[Sample], source: TokenSource, config: TrainConfig, *, has_visual: bool
) -> list[Sample]:
    """Samples of the eval split that can be shown to the model, in an order that follows from their ids alone.

    Raises UserError if there are none, except under the caption prompt: few stores hold captions back.
    """
    wanted = [sample for sample in samples if sample.split == config.eval_split and _can_change(sample, config)]
    wanted = showable(wanted, source, has_visual=has_visual)
    if not wanted and config.prompt != "caption":
        found = ", ".join(sorted({sample.split for sample in samples})) or "none"
        raise UserError(
            f"eval_every is {config.eval_every}, but no sample of split {config.eval_split!r} has tokens; splits found:"
            f" {found}; choose another eval_split, leave eval_every out, or, if the store was made with --limit"
            f" ({FIRST_CLIPS}), extract again without it"
        )
    return sorted(wanted, key=lambda sample: (derive_seed("validation", sample.sample_id), sample.digest))


def _can_change(sample: Sample, config: TrainConfig) -> bool:
    """Whether training can change the sample's loss: that of a text under a frozen LLM is fixed."""
    if sample.clip_id is None and (config.train_llm == "none" or config.prompt == "caption"):
        return False
    if config.prompt == "caption" and sample.stage != config.stage:
        return False
    has_clip = sample.clip_id is not None
    return reason_to_refuse(config.prompt, sample.turns, config.visual_position, has_clip=has_clip) is None


def modality(sample: Sample, stills: set[str]) -> str:
    """One of `MODALITIES`: what the sample is about."""
    if sample.clip_id is None:
        return "text"
    return "image" if sample.clip_id in stills else "video"
