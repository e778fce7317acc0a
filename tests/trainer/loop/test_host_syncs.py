"""How often a step reads a value of the device on the host, which makes the host wait for all that it has launched.

Counted on the CPU, through torch's dispatch: what reads a tensor's value there would wait for a GPU.
"""

import traceback
from collections import Counter
from dataclasses import replace

import pytest
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.loop.plan import make_plan
from trainer.loop.train import time_steps, train

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}  # of aten
METHODS = {"tolist", "cpu", "numpy", "__array__"}  # on a CPU they are no operation of aten


class Reads(TorchDispatchMode):
    """Within the block, by the function that reads: how often."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def note(self):
        frames = [f for f in traceback.extract_stack() if "/trainer/" in f.filename or "/transformers/" in f.filename]
        frames = [f for f in frames if "/tests/" not in f.filename]
        self.places[frames[-1].name if frames else "elsewhere"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS:
            self.note()
        return func(*args, **(kwargs or {}))


class MethodReads(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in METHODS:
            self.reads.note()
        return func(*args, **(kwargs or {}))


def reads_of_a_step(config, samples, tokens, monkeypatch):
    """Of the second step of a run, reading its data left out."""
    from trainer.loop import train as module

    counted, step = [], module._Loop._step

    def counting(loop, model, optimizer, number, read):
        with Reads() as reads, MethodReads(reads):
            row = step(loop, model, optimizer, number, read)
        counted.append((reads.places, len(read.micro_batches)))
        return row

    monkeypatch.setattr(module._Loop, "_step", counting)
    plan = make_plan(config, samples, tokens)
    time_steps(plan, tokens, range(2))
    return counted[-1]


@pytest.mark.parametrize("train_llm", ["full", "lora"])
def test_on_one_gpu_a_step_waits_once_for_each_micro_batch(config, samples, tokens, pretrained, monkeypatch, train_llm):
    """transformers looks whether positions are those of packed sequences before it leaves the mask out."""
    monkeypatch.setattr("trainer.loop.distributed.decides_on_device", lambda accelerator: True)
    config = replace(config, llm=pretrained, train_llm=train_llm, micro_batch_size=2)
    places, num_micro_batches = reads_of_a_step(config, samples, tokens, monkeypatch)
    assert num_micro_batches == 3
    assert places == {"find_packed_sequence_indices": num_micro_batches}


def test_elsewhere_a_step_also_reads_whether_its_numbers_are_finite(config, samples, tokens, monkeypatch):
    places, num_micro_batches = reads_of_a_step(config, samples, tokens, monkeypatch)
    assert places.pop("find_packed_sequence_indices") == num_micro_batches
    del places["_update"]  # AdamW's numbers of updates, which are on the host where it is not fused
    assert places == {"<listcomp>": 1}  # of any_rank


def test_metrics_are_read_where_they_are_written(config, samples, tokens, tmp_path):
    with Reads() as reads, MethodReads(reads):
        train(replace(config, max_steps=2, log_every=2, checkpoint_every=2), samples, tokens, tmp_path, quiet=True)
    assert reads.places["finite_or_none"] > 0
