"""A small store of questions and a small LLM on disk, and the benchmarks on the path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore import Clip, FeatureIdentity, StoreWriter
from featurestore.samples import Sample, Turn

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COLOURS = ("red", "green", "blue")
WIDTHS = {"dinov2": 8, "vivit": 6}
GRID = (4, 2, 2)


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    """They import each other as scripts do, from their own folder; processes they spawn inherit the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def question_store(tmp_path):
    """16 training questions and 6 held-out ones, each about a clip of its own whose tokens give the answer away."""
    path = tmp_path / "toy.zarr"
    clips = [Clip(dataset="set", path=f"clip{index}.mp4", kind="video") for index in range(22)]
    writer = StoreWriter.open_or_create(path, block_rows={"video": 32, "image": 32})
    rows = writer.add_clips(clips)
    random = np.random.default_rng(0)
    for encoder, width in WIDTHS.items():
        group = writer.ensure_group("video", identity(encoder, width), batch_shape=1, weights_label="random:0")
        task = group.begin(0)
        for row, clip in rows:
            tokens = random.standard_normal((*GRID, width)).astype(np.float32)
            tokens[..., 0] += 4 * (clips.index(clip) % 3)
            task.add(row, {"tokens": tokens}, media_sha256="0" * 64, decoder="frames/1")
        task.commit()
    writer.add_samples("toy-finetune", [question(index, clip) for index, clip in enumerate(clips)])
    writer.publish_snapshot()
    return path


def question(index, clip):
    answer = COLOURS[index % 3]
    return Sample(
        sample_id=f"s{index:03d}",
        clip_id=clip.clip_id,
        turns=(Turn(role="human", text="<video>\nWhat colour is it?"), Turn(role="gpt", text=answer)),
        stage="finetune",
        split="train" if index < 16 else "heldout",
        source="toy",
        category="colour",
        options=COLOURS,
        answer_index=COLOURS.index(answer),
    )


def identity(encoder, width):
    return FeatureIdentity(
        encoder=encoder,
        architecture={"class": "Toy"},
        weights_sha256="0" * 64,
        layer="last",
        num_frames=4,
        frame_rule="linspace-32/8",
        decode="frames/1",
        preprocessing={},
        still_period=1,
        grid=GRID,
        pooling="adaptive-avg",
        width=width,
    )


@pytest.fixture
def llm_folder(tmp_path):
    """A pretrained LLM as far as loading goes: a folder with weights and tokenizer."""
    from trainer.model.llm import load_llm

    torch.manual_seed(0)
    llm = load_llm("fresh:tiny", texts=["In: What colour is it?\nOut: red green blue"])
    llm.model.save_pretrained(tmp_path / "llm")
    llm.tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"
