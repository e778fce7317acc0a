"""Token budgets, and memory that runs out on one of two ranks, over gloo: DDP, and FSDP as in test_sharded_ranks.py."""

import json

import pytest

from tests.trainer.loop.test_sharded_ranks import launcher_environment
from trainer.loop.accumulate import LIMIT_FILE
from trainer.runs import checkpoint
from trainer.runs.run_record import read_metrics

pytestmark = pytest.mark.slow

SCRIPT = """
import json
import os
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from mervcache.errors import MervCacheError
from tests.trainer.loop.toy_runs import toy_config, toy_questions, toy_tokens

import trainer.loop.train
from trainer.loop import distributed as ranks
from trainer.model.video_llm import VideoLLM

plain = VideoLLM.forward


def sharding(config, run):
    AcceleratorState._reset_state()
    if PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    accelerator = ranks.make_accelerator(config, run)
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = ranks.fsdp_plugin(config)
    return accelerator


def go(out, changes, resume=False, fails_behind=None, positions=0):
    calls = []

    def failing(self, batch):
        calls.append(batch.labels_BS.numel())
        loss = plain(self, batch)
        if len(calls) > fails_behind and calls[-1] > positions and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    VideoLLM.forward = plain if fails_behind is None else failing
    samples, tokens = toy_questions(16), toy_tokens(16)
    config = toy_config(max_steps=4, checkpoint_every=2, keep_checkpoints=5, **changes)
    try:
        trainer.loop.train.train(config, samples, tokens, out, resume=resume, quiet=True)
    except MervCacheError as error:
        print(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        trainer.loop.train.make_accelerator = sharding
    for options in json.loads(sys.argv[1]):
        go(**options)
"""
BY_NUMBER, BUDGET = {"batch_size": 6, "micro_batch_size": 1}, {"batch_size": 6, "token_budget": 20}
FEW = {"batch_size": 3, "token_budget": 1}  # an odd number of samples, each alone: one rank has nothing in the last


@pytest.fixture(scope="module")
def alone(tmp_path_factory, run_here):
    """The runs by this process, in micro-batches of single samples."""
    go, folder = run_here(SCRIPT)["go"], tmp_path_factory.mktemp("one")
    go(folder / "six", BY_NUMBER)
    go(folder / "few", {"batch_size": 3, "micro_batch_size": 1})
    return folder


def assert_same_losses(run, wanted, tolerance=1e-4):
    rows, expected = read_metrics(run), read_metrics(wanted)
    assert [row["step"] for row in rows] == list(range(4))
    for name in ("loss", "grad_norm"):
        found = [row[name] for row in rows]
        assert found == pytest.approx([row[name] for row in expected], rel=tolerance), name


@pytest.mark.parametrize("launch", ["ddp", "fsdp"])
def test_two_ranks_under_a_budget_have_the_losses_of_one_also_where_samples_do_not_suffice(
    alone, tmp_path, free_port, run_by_two, launch
):
    runs = [
        {"out": str(tmp_path / "six"), "changes": BUDGET},
        {"out": str(tmp_path / "few"), "changes": FEW},
    ]
    environment = launcher_environment(launch, 2)
    ended = run_by_two(tmp_path, SCRIPT, runs, free_port, environment)
    assert [(code, text) for code, text, _ in ended] == [(0, "")] * 2, "\n".join(errors for _, _, errors in ended)
    for name in ("six", "few"):
        assert_same_losses(tmp_path / name, alone / name, 1e-4 if launch == "ddp" else 1e-3)


def test_where_memory_runs_out_on_one_rank_of_ddp_both_save_and_resume_smaller(alone, tmp_path, free_port, run_by_two):
    changes = {"batch_size": 6, "micro_batch_size": 3}  # one forward a step
    runs = [
        {"out": str(tmp_path / "run"), "changes": changes, "fails_behind": 3, "positions": 20},
        {"out": str(tmp_path / "run"), "changes": changes, "fails_behind": 0, "positions": 20, "resume": True},
        # a sample with a clip does not fit, the shortest text does
        {"out": str(tmp_path / "hopeless"), "changes": BY_NUMBER, "fails_behind": 0, "positions": 10},
    ]
    ended = run_by_two(tmp_path, SCRIPT, runs, free_port)
    assert [code for code, _, _ in ended] == [0, 0], "\n".join(errors for _, _, errors in ended)
    messages = [text.splitlines() for _, text, _ in ended]
    assert messages[0] == messages[1]
    first, hopeless = messages[0]
    assert "step 3 with micro_batch_size 3 on one of 2 processes" in first
    assert "--resume auto, which uses micro_batch_size 1" in first
    assert "nothing smaller is the same training" in hopeless
    saved = [checkpoint.read_state(folder).step for folder in checkpoint.checkpoints(tmp_path / "run")]
    assert saved == [2, 3, 4]  # the second step's, the one before the failure, and the last
    assert json.loads((tmp_path / "run" / LIMIT_FILE).read_text()) == {"samples": 1, "tokens": None}
    assert_same_losses(tmp_path / "run", alone / "six")


def test_a_rank_of_fsdp_ends_and_the_run_resumes_smaller_from_its_checkpoint(alone, tmp_path, free_port, run_by_two):
    changes, environment = {"batch_size": 6, "micro_batch_size": 3}, launcher_environment("fsdp", 2)
    failing = {"out": str(tmp_path / "run"), "changes": changes, "fails_behind": 3, "positions": 20}
    ended = run_by_two(tmp_path, SCRIPT, [failing], free_port, environment)
    assert "step 3 with micro_batch_size 3" in ended[1][1]
    assert checkpoint.newest(tmp_path / "run").name == "step-00000002"
    again = {**failing, "fails_behind": 0, "resume": True}
    ended = run_by_two(tmp_path, SCRIPT, [again], free_port, environment)
    assert [code for code, _, _ in ended] == [0, 0], "\n".join(errors for _, _, errors in ended)
    assert_same_losses(tmp_path / "run", alone / "six", 1e-3)
