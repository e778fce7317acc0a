"""Of one process; tests/trainer/loop/test_sharded_ranks.py has two."""

import pytest
import torch

from trainer.runs.checkpoint import full_tensor, placed_like
from trainer.runs.saver import BackgroundSaver, staged


def test_whole_tensors_stay_what_they_are():
    value = torch.arange(3.0)
    assert full_tensor(value) is value
    assert torch.equal(placed_like(value, torch.zeros(3)), value)


def test_what_is_staged_does_not_follow_the_next_step():
    value = torch.arange(3.0)
    copies = staged({"a": value})
    value.mul_(2)
    assert copies["a"].tolist() == [0.0, 1.0, 2.0]


def test_a_write_in_the_background_is_waited_for_and_its_failure_raised_once():
    saver, written = BackgroundSaver(), []
    with saver:
        saver.start(lambda: written.append(1))
    assert written == [1]
    saver.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    saver.wait()


def test_the_error_that_ends_a_run_is_not_hidden_by_that_of_a_write():
    def run():
        with BackgroundSaver() as saver:
            saver.start(lambda: 1 / 0)
            raise KeyError

    with pytest.raises(KeyError):
        run()
