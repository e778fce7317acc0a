"""Small conversations, tokens and tokenizers for the trainer's tests."""

from __future__ import annotations

import pytest
import torch

from featurestore.samples import Sample, Turn
from trainer.config import OptimizerConfig, ProjectorConfig, TrainConfig
from trainer.llm import FRESH_LLMS, FreshLLM
from trainer.tokens import MemoryTokens

COLOURS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-equal sums need one order; and the tests share few cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def mini_llm(monkeypatch):
    """`fresh:mini`, smaller than any LLM that is offered."""
    monkeypatch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=32, num_layers=2, num_heads=2, context=128))


@pytest.fixture
def make_sample():
    def make(index: int, *, clip_id: str | None = "", split: str = "train", answer: str | None = None) -> Sample:
        answer = answer or COLOURS[index % 3]
        return Sample(
            sample_id=f"s{index:03d}",
            clip_id=f"set/clip{index}.mp4" if clip_id == "" else clip_id,
            turns=(Turn(role="human", text="<video>\nWhat colour is it?"), Turn(role="gpt", text=answer)),
            stage="finetune",
            split=split,
            source="toy",
            category="colour",
            options=COLOURS,
            answer_index=COLOURS.index(answer),
        )

    return make


@pytest.fixture
def samples(make_sample):
    """18 questions whose answers only the clip gives away."""
    return [make_sample(index) for index in range(18)]


@pytest.fixture
def tokens(samples):
    """Random tokens of two encoders of unlike width and scale."""
    random = torch.Generator().manual_seed(3)
    clips = [sample.clip_id for sample in samples]
    return MemoryTokens(
        clips,
        {
            "dinov2": torch.randn(len(clips), 4, 2, 2, 8, generator=random),
            "vivit": torch.randn(len(clips), 4, 2, 2, 6, generator=random) * 20 + 5,
        },
    )


@pytest.fixture
def config():
    """A run of some seconds."""
    return TrainConfig(
        llm="fresh:mini",
        train_llm="full",
        projector=ProjectorConfig(grid=(2, 2, 2), standardise="channel"),
        optimizer=OptimizerConfig(projector_lr=3e-3, fusion_lr=3e-3, llm_lr=3e-3, warmup_ratio=0.1),
        batch_size=6,
        micro_batch_size=4,
        max_steps=6,
        precision="fp32",
        log_every=2,
        checkpoint_every=2,
        keep_checkpoints=5,
    )
