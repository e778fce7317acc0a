"""A small store of questions and a small LLM on disk, and the benchmarks on the path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore import Clip
from featurestore.clips import Sample, Turn

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
def question_store(tmp_path, toy_identity, write_store):
    """16 training questions and 6 held-out ones, each about a clip of its own whose tokens give the answer away."""
    clips = [Clip(dataset="set", path=f"clip{index}.mp4", kind="video") for index in range(22)]
    random, arrays = np.random.default_rng(0), {}
    for encoder, width in WIDTHS.items():
        for index, clip in enumerate(clips):
            tokens = random.standard_normal((*GRID, width)).astype(np.float32)
            tokens[..., 0] += 4 * (index % 3)
            arrays[encoder, clip.clip_id] = {"tokens": tokens}
    identities = {encoder: toy_identity(encoder, grid=GRID, width=width) for encoder, width in WIDTHS.items()}
    writer = write_store(tmp_path / "toy.zarr", clips, identities, arrays, block_rows=32)
    writer.add_samples("toy-finetune", [question(index, clip) for index, clip in enumerate(clips)])
    writer.publish_snapshot()
    return tmp_path / "toy.zarr"


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


@pytest.fixture
def llm_folder(tmp_path):
    """A pretrained LLM as far as loading goes: a folder with weights and tokenizer."""
    from trainer.model.llm import load_llm

    torch.manual_seed(0)
    llm = load_llm("fresh:tiny", texts=["In: What colour is it?\nOut: red green blue"])
    llm.model.save_pretrained(tmp_path / "llm")
    llm.tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"
