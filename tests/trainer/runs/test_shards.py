"""Of one process; tests/trainer/loop/test_sharded_ranks.py has two."""

import torch

from trainer.runs.checkpoint import full_tensor, gather_full, placed_like


def test_whole_tensors_stay_what_they_are():
    value = torch.arange(3.0)
    assert full_tensor(value) is value
    assert torch.equal(placed_like(value, torch.zeros(3)), value)
    assert list(gather_full({"a": value}, keep=True)) == ["a"]
    assert gather_full({"a": value}, keep=False) == {}
