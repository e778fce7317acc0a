"""Validate: the held-out samples of a run while it trains: accuracy on questions, and loss by modality.

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

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor

from featurestore.clips import Sample
from mervcache.console import say
from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.data.order import derive_seed
from trainer.data.prompts import reason_to_refuse
from trainer.data.tokens import TokenSource
from trainer.loop.plan import Plan
from trainer.model.multiple_choice import FIRST_CLIPS, answer_batch, batch_of, is_whole, showable

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
            say(said)

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
