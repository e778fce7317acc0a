"""A device that runs out of memory, and token budgets, in one process."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from featurestore.clips import Turn
from mervcache.errors import RunStoppedError
from trainer.loop.accumulate import LIMIT_FILE
from trainer.loop.train import train
from trainer.model.video_llm import VideoLLM
from trainer.runs import checkpoint
from trainer.runs.run_record import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def unlike(samples):
    """Answers of one to seven words."""
    answers = [" ".join([sample.options[index % 3]] * (1 + index % 7)) for index, sample in enumerate(samples)]
    return [
        replace(sample, turns=(sample.turns[0], Turn(role="gpt", text=answer)))
        for sample, answer in zip(samples, answers, strict=True)
    ]


def cuda_error():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB in all.\nMore")


def cpu_error():
    torch.empty(2**62, dtype=torch.int8)  # more than any address space: torch's allocator refuses


@pytest.fixture
def device_of(monkeypatch):
    """`device_of(positions, fail)`: from then on a forward of more positions fails; returns the sizes of forwards."""
    plain = VideoLLM.forward

    def limit(positions, fail=cuda_error, behind=0):
        sizes = []

        def forward(self, batch):
            sizes.append(batch.labels_BS.numel())
            loss = plain(self, batch)
            if batch.labels_BS.numel() > positions and len(sizes) > behind:
                fail()
            return loss

        monkeypatch.setattr(VideoLLM, "forward", forward)
        return sizes

    return limit


def losses(run):
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(run)]


def weights(run):
    return load_file(checkpoint.newest(run) / checkpoint.MODEL_FILE)


def assert_same_run(run, wanted):
    assert losses(run) == losses(wanted)
    found, expected = weights(run), weights(wanted)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("fail", [cuda_error, cpu_error])
def test_a_run_that_was_too_large_is_the_run_that_was_small_from_the_start(
    tmp_path, config, unlike, tokens, device_of, fail, caplog
):
    config = replace(config, micro_batch_size=6)
    train(replace(config, micro_batch_size=1), unlike, tokens, tmp_path / "small", quiet=True)
    assert not (tmp_path / "small" / LIMIT_FILE).exists()
    device_of(35, fail)  # a sample takes at most 25 positions
    train(config, unlike, tokens, tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "small")
    assert json.loads((tmp_path / "run" / LIMIT_FILE).read_text()) == {"samples": 1, "tokens": None}
    assert "step 0 is done again with micro_batch_size 1" in caplog.text


def test_a_budget_that_was_too_large_is_halved(tmp_path, config, unlike, tokens, device_of):
    config = replace(config, token_budget=160)
    train(replace(config, token_budget=40), unlike, tokens, tmp_path / "small", quiet=True)
    device_of(40)
    train(config, unlike, tokens, tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "small")
    assert json.loads((tmp_path / "run" / LIMIT_FILE).read_text()) == {"samples": 4, "tokens": 40}


def test_a_run_that_fails_later_keeps_its_steps_and_resumes_with_the_smaller_limit(
    tmp_path, config, unlike, tokens, device_of
):
    config = replace(config, micro_batch_size=2)
    train(config, unlike, tokens, tmp_path / "whole", quiet=True)
    sizes = device_of(35, behind=7)  # two steps of three forwards, and one of the third
    train(config, unlike, tokens, tmp_path / "run", stop_at=4, quiet=True)
    assert len(sizes) == 2 * 3 + 2 + 2 * 6  # two of the third step were in vain
    sizes.clear()
    train(config, unlike, tokens, tmp_path / "run", resume=True, quiet=True)
    assert len(sizes) == 2 * 6
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(6))
    assert losses(tmp_path / "run")[:2] == losses(tmp_path / "whole")[:2]
    for found, wanted in zip(losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"loss": "micro_batch_means"}])
def test_a_run_that_cannot_be_smaller_ends_and_keeps_its_checkpoints(
    tmp_path, config, unlike, tokens, device_of, changes
):
    config = replace(config, micro_batch_size=2, **changes)
    sizes = device_of(0, behind=9)  # three steps
    with pytest.raises(RunStoppedError, match=r"memory ran out in step 3 .* activation_checkpointing: true"):
        train(config, unlike, tokens, tmp_path / "run", quiet=True)
    assert len(sizes) == (10 if changes else 11)
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run")).step == 2
    # on a larger device it goes on
    device_of(10**6)
    assert train(config, unlike, tokens, tmp_path / "run", resume=True, quiet=True).steps == 6


def test_another_error_of_a_layer_is_no_lack_of_memory(tmp_path, config, unlike, tokens, device_of):
    def fail():
        raise RuntimeError("shapes do not match")

    device_of(0, fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(config, unlike, tokens, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / LIMIT_FILE).exists()


def test_losses_under_a_budget_are_those_of_micro_batches_by_number(tmp_path, config, unlike, tokens):
    """The per-token loss without dropout: the same sums in another order."""
    config = replace(config, batch_size=6, micro_batch_size=6)
    train(config, unlike, tokens, tmp_path / "number", quiet=True)
    train(replace(config, token_budget=60), unlike, tokens, tmp_path / "tokens", quiet=True)
    pairs = list(zip(losses(tmp_path / "tokens"), losses(tmp_path / "number"), strict=True))
    assert all(found == pytest.approx(wanted, rel=2e-5) for found, wanted in pairs)
    padding = [[row["padding_share"] for row in read_metrics(tmp_path / name)] for name in ("tokens", "number")]
    assert sum(padding[0]) < sum(padding[1])
