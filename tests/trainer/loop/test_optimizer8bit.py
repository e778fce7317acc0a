"""8-bit AdamW of bitsandbytes, which runs on CPUs too."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

from mervcache.errors import UserError
from trainer.loop.optimizer import build_optimizer
from trainer.loop.train import train
from trainer.runs import checkpoint
from trainer.runs.run_record import read_metrics

needs_it = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture
def config(config):
    return replace(config, llm="fresh:tiny")  # tensors below 4,096 values keep fp32 moments


@pytest.fixture
def small(config):
    return replace(config, optimizer=replace(config.optimizer, name="adamw8bit"))


@needs_it
def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(tmp_path, small, samples, tokens):
    train(small, samples, tokens, tmp_path / "whole", quiet=True)
    train(small, samples, tokens, tmp_path / "parts", stop_at=4, quiet=True)
    train(small, samples, tokens, tmp_path / "parts", resume=True, quiet=True)
    whole, parts = ([row["loss"] for row in read_metrics(tmp_path / run)] for run in ("whole", "parts"))
    assert parts == whole
    one, other = (checkpoint.load_state(checkpoint.newest(tmp_path / run)).sha256 for run in ("whole", "parts"))
    assert one == other


@needs_it
def test_moments_of_larger_tensors_take_a_byte(tmp_path, small, samples, tokens):
    train(replace(small, max_steps=1), samples, tokens, tmp_path / "run", quiet=True)
    moments = load_file(checkpoint.newest(tmp_path / "run") / checkpoint.OPTIMIZER_FILE)
    weight = moments["llm.model.layers.0.mlp.up_proj.weight/state1"]
    bias = next(value for name, value in moments.items() if name.endswith(".bias/state1"))
    assert (weight.element_size(), bias.element_size()) == (1, 4)


@needs_it
def test_it_learns_about_as_fast(tmp_path, small, config, samples, tokens):
    losses = [train(c, samples, tokens, tmp_path / c.optimizer.name, quiet=True).loss for c in (small, config)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_it_is_refused_with_the_command_that_installs_it(brief, small):
    with pytest.raises(UserError, match="pip install 'merv-pipeline"):
        build_optimizer(brief.built.model, small.optimizer)


def test_under_fsdp_it_is_refused(brief, small):
    with pytest.raises(UserError, match="--launch ddp"):
        build_optimizer(brief.built.model, small.optimizer, is_sharded=True)
