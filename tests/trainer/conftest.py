"""Small conversations, tokens and tokenizers for the trainer's tests."""

from __future__ import annotations

import random
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch

from featurestore import Clip, FeatureStore, StoreWriter
from featurestore.clips import Sample, Turn
from trainer.config import OptimizerConfig, ProjectorConfig, TrainConfig
from trainer.data.tokens import MemoryTokens
from trainer.model.llm import FRESH_LLMS, FreshLLM, load_llm

COLOURS = ("red", "green", "blue")
GRIDS = {"dinov2": ((4, 2, 2), 8, 1), "vivit": ((4, 2, 2), 6, 4)}  # grid, width, still period


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
        projector=ProjectorConfig(grid=(2, 2, 2), standardise=True),
        optimizer=OptimizerConfig(projector_lr=3e-3, fusion_lr=3e-3, llm_lr=3e-3, warmup_ratio=0.1),
        batch_size=6,
        micro_batch_size=4,
        max_steps=6,
        precision="fp32",
        log_every=2,
        checkpoint_every=2,
        keep_checkpoints=5,
    )


@pytest.fixture
def brief(tmp_path, config, samples, tokens):
    """A run of one step: knows nothing, but is whole."""
    from trainer.loop.train import train
    from trainer.runs.load import load_run

    train(replace(config, max_steps=1), samples, tokens, tmp_path / "run", quiet=True)
    return load_run(tmp_path / "run")


@pytest.fixture
def pretrained(tmp_path):
    """A folder with a causal LM that knows the words of `samples`: what a Hub id stands for."""
    torch.manual_seed(11)
    llm = load_llm("fresh:mini", texts=["In: What colour is it? Out: red green blue"])
    llm.model.save_pretrained(tmp_path / "llm")
    llm.tokenizer.save_pretrained(tmp_path / "llm")
    return str(tmp_path / "llm")


@pytest.fixture
def clips():
    videos = [Clip(dataset="set", path=f"clip{index}.mp4", kind="video") for index in range(6)]
    return [*videos, Clip(dataset="set", path="still.jpg", kind="image")]


@pytest.fixture
def identities(toy_identity):
    """Of the encoders in `GRIDS`."""
    return {
        encoder: toy_identity(encoder, grid=grid, width=width, still_period=still_period)
        for encoder, (grid, width, still_period) in GRIDS.items()
    }


@pytest.fixture
def tokens_of(clips, identities):
    random = np.random.default_rng(0)
    return {
        encoder: {
            clip.clip_id: random.standard_normal((*identity.grid_of(clip.kind), identity.width)).astype(np.float16)
            for clip in clips
        }
        for encoder, identity in identities.items()
    }


@pytest.fixture
def store(tmp_path, clips, tokens_of, identities, write_store):
    """Six videos and a still, two encoders; one clip failed for one of them."""
    arrays = {(encoder, clip): {"tokens": each} for encoder, found in tokens_of.items() for clip, each in found.items()}
    failed = [("vivit", clips[1].clip_id)]
    write_store(tmp_path / "toy.zarr", clips, identities, arrays, failed=failed).publish_snapshot()
    return FeatureStore.open(tmp_path / "toy.zarr")


@pytest.fixture
def make_question_store(make_sample, identities, write_store):
    """Writes a store of some of 21 videos: a question about each, of which those from 18 on are held out.

    `failed` are pairs of an encoder and a clip without its tokens.
    """

    def make(path, indices=range(21), failed=()):
        samples = [make_sample(index, split="train" if index < 18 else "heldout") for index in indices]
        videos = [Clip(dataset="set", path=f"clip{index}.mp4", kind="video") for index in range(21)]
        random = np.random.default_rng(1)
        arrays = {
            (encoder, clip.clip_id): {"tokens": random.standard_normal((*grid, width)).astype(np.float16)}
            for encoder, (grid, width, _) in GRIDS.items()
            for clip in videos
        }
        writer = write_store(path, [videos[index] for index in indices], identities, arrays, failed=failed)
        writer.add_samples("toy-finetune", samples)
        writer.publish_snapshot()
        return path

    return make


@pytest.fixture
def question_store(tmp_path, make_question_store):
    """18 training questions and 3 held-out ones about 21 videos, as a folder on disk."""
    return make_question_store(tmp_path / "features" / "toy.zarr")


@pytest.fixture
def benchmark_run(tmp_path, config, question_store, make_sample):
    """A run of one step on a store with two benchmarks: 3 open-ended questions, 2 multiple-choice ones."""
    from trainer.loop.train import train
    from trainer.sources import open_store

    samples, tokens = open_store(str(question_store), config)
    train(replace(config, max_steps=1), samples, tokens, tmp_path / "run", store=str(question_store), quiet=True)
    writer = StoreWriter.open_or_create(question_store)
    held = [replace(make_sample(index, split="heldout"), stage="eval") for index in range(5)]
    opened = [replace(one, source="MSVD", options=(), answer_index=None, category="what") for one in held[:3]]
    chosen = [replace(one, source="NExT/QA", category=("causal", "temporal")[i]) for i, one in enumerate(held[3:])]
    writer.add_samples("bench", [*opened, *chosen])
    writer.publish_snapshot()
    return tmp_path / "run"


@pytest.fixture(scope="session")
def media_lab():
    """The module of coloured films and toy encoders beside this file."""
    from tests.trainer import media_lab as module  # torch and the pipeline

    return module


@pytest.fixture(scope="session")
def media_root(media_lab, tmp_path_factory):
    """Films and pictures, one of them broken; nobody changes them."""
    return media_lab.make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="session")
def extracted(media_lab, media_root, tmp_path_factory):
    """A store of all four toy encoders, by the pipeline itself."""
    from pipeline.config import read_config as read_extract_config
    from pipeline.extract import extract

    path = tmp_path_factory.mktemp("stores") / "colours.zarr"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    extract(read_extract_config(None, media_lab.settings(media_root, store=str(path))), quiet=True)
    torch.set_num_threads(before)
    return path


@pytest.fixture(scope="module")
def free_port():
    """A port for ranks to meet at, below those that connections take of themselves: two tests run side by side."""
    for port in random.sample(range(20_000, 30_000), 100):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise OSError("no free port among 100 between 20000 and 30000")
