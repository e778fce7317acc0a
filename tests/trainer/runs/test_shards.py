"""Of one process; tests/trainer/loop/test_sharded_ranks.py has two."""

import torch

from trainer.runs.checkpoint import placed_like, plain, whole


def test_whole_tensors_stay_what_they_are():
    value = torch.arange(3.0)
    assert plain(value) is value
    assert torch.equal(placed_like(value, torch.zeros(3)), value)
    assert list(whole({"a": value}, keep=True)) == ["a"]
    assert whole({"a": value}, keep=False) == {}
