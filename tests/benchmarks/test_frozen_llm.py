import json

import pytest
import torch
from click.testing import CliRunner

from trainer.config import OptimizerConfig, ProjectorConfig, TrainConfig


def test_a_run_is_shown_beside_its_llm_alone_and_beside_other_clips(tmp_path, question_store, llm_folder):
    from frozen_llm import main

    from trainer.loop.train import train
    from trainer.sources import open_store

    config = TrainConfig(
        llm=str(llm_folder),
        projector=ProjectorConfig(grid=(2, 2, 2)),
        optimizer=OptimizerConfig(projector_lr=2e-2, fusion_lr=2e-2),
        batch_size=8,
        max_steps=60,
        precision="fp32",
    )
    samples, source = open_store(str(question_store), config)
    train(config, samples, source, tmp_path / "run", store=str(question_store), quiet=True)
    result = CliRunner().invoke(main, [str(tmp_path / "run")], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert (found["steps"], found["samples below"]) == (60, 16)
    assert found["without visual tokens"] == pytest.approx(plain_loss(llm_folder), rel=1e-4)
    assert found["loss of the last 5 steps"] < found["loss of the first 5 steps"]
    # Clips take turns in three colours, so the next clip is always of another one.
    assert found["with the clip"] < found["with another clip"]


def plain_loss(folder):
    """The same, written out: cross-entropy of the answer and the end token behind the prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for index in range(16):
        prompt = tokenizer("In: What colour is it?\nOut:")["input_ids"]
        answer = tokenizer(("red", "green", "blue")[index % 3], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            chances = model(ids).logits[0].log_softmax(-1)
        losses += [-float(chances[place - 1, ids[0, place]]) for place in range(len(prompt), ids.shape[1])]
    return sum(losses) / len(losses)


def test_every_place_gets_the_next_other_clip():
    from frozen_llm import swapped

    assert swapped(["a", "a", "b", "c"]) == ["b", "b", "c", "a"]
