"""FSDP on two CPU processes.

accelerate shards on GPUs only: on CPUs it takes the environment of its own launcher for plain data parallelism. So the
script below sets accelerate's state to sharding; everything else is what a GPU run does, over gloo.
"""

import json
import shutil

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.loop.distributed import make_accelerator
from trainer.loop.launch import LAUNCH_FILES
from trainer.runs import checkpoint
from trainer.runs.run_record import read_metrics

pytestmark = pytest.mark.slow

SCRIPT = """
import json
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tests.trainer.loop.toy_runs import as_captions, toy_config, toy_questions, toy_tokens, two_stages

import trainer.loop.train
import trainer.model.video_llm
from trainer.loop import distributed as ranks
from trainer.loop.stages import train_stages

held = []  # share of the elements of the model's parameters that this process holds


def sharding(config, run):
    AcceleratorState._reset_state()
    if PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    accelerator = ranks.make_accelerator(config, run)
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = ranks.fsdp_plugin(config)
    assert accelerator.is_fsdp2
    return accelerator


def weighing(accelerator, model, optimizer):
    prepared = ranks.prepare(accelerator, model, optimizer)
    local = sum(p.to_local().numel() for p in model.parameters())
    held.append(local / sum(p.numel() for p in model.parameters()))
    # Between micro-batches too: else every rank would keep whole gradients.
    prepared[0].set_requires_gradient_sync = lambda is_synced: sys.exit("gradients are not divided")
    return prepared


def go(out, changes, resume=False, stop_at=None, is_chain=False, odd=None):
    samples, tokens = toy_questions(16, num_trained=12), toy_tokens(16, odd)
    config = toy_config(max_steps=4, eval_every=2, checkpoint_every=2, keep_checkpoints=5, **changes)
    if is_chain:
        both = [*samples, *as_captions(samples)]
        train_stages(two_stages(config, align_steps=2), lambda stage_config, run: (both, tokens), out, quiet=True)
        return
    trainer.loop.train.train(config, samples, tokens, out, resume=resume, stop_at=stop_at, quiet=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer.loop.train.make_accelerator, trainer.loop.train.prepare = sharding, weighing
    trainer.model.video_llm.LOGIT_BYTES = 1  # a token at a time: its logits are computed again from sharded weights
    for options in json.loads(sys.argv[1]):
        go(**options)
    print(json.dumps(held))
"""
FULL = {}
ODD = {"projector": {"grid": [1, 2, 2], "standardise": False}}  # for tokens with an infinite value
PARTLY = {"train_llm": "lora", "activation_checkpointing": True, "precision": "bf16"}  # and frozen weights in bfloat16


@pytest.fixture(scope="module")
def go(run_here):
    """The script's runs, in this process alone."""
    return run_here(SCRIPT)["go"]


def launcher_environment(launch, processes):
    """What accelerate's launcher sets for one of our files."""
    options = ["--config_file", str(LAUNCH_FILES[launch]), "--num_processes", str(processes), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    return prepare_multi_gpu_env(arguments)


def shapes(path):
    return {name: (value.shape, value.dtype) for name, value in load_file(path).items()}


def column(run, name):
    return [row[name] for row in read_metrics(run) if name in row]


def test_two_sharded_ranks_train_validate_save_and_resume_as_one(tmp_path, go, pretrained, free_port, run_by_two):
    partly = {**PARTLY, "llm": pretrained}
    runs = [
        {"out": str(tmp_path / "full"), "changes": FULL, "stop_at": 2},
        {"out": str(tmp_path / "full"), "changes": FULL, "resume": True},
        {"out": str(tmp_path / "partly"), "changes": partly},
        {"out": str(tmp_path / "chain"), "changes": FULL, "is_chain": True},
        {"out": str(tmp_path / "odd"), "changes": ODD, "odd": 4, "stop_at": 2},
        {"out": str(tmp_path / "odd"), "changes": ODD, "odd": 4, "resume": True},
    ]
    ended = run_by_two(tmp_path, SCRIPT, runs, free_port, launcher_environment("fsdp", 2))
    assert [code for code, _, _ in ended] == [0, 0], "\n".join(errors for _, _, errors in ended)
    held = [share for _, shares, _ in ended for share in json.loads(shares)]
    assert len(held) == 2 * 7  # the chain is two
    assert all(0.4 < share < 0.6 for share in held)

    for name, changes, tolerance in [("full", FULL, 1e-3), ("partly", partly, 3e-2)]:
        alone = tmp_path / f"{name}-alone"
        go(alone, changes)
        for metric in ("loss", "grad_norm", "val_loss", "val_loss_text", "val_accuracy"):
            assert column(tmp_path / name, metric) == pytest.approx(column(alone, metric), rel=tolerance), metric
        for file in (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE):
            found, wanted = (load_file(checkpoint.newest(run) / file) for run in (tmp_path / name, alone))
            assert {n: (v.shape, v.dtype) for n, v in found.items()} == {
                n: (v.shape, v.dtype) for n, v in wanted.items()
            }

    go(tmp_path / "chain-alone", FULL, is_chain=True)
    for stage in ("align", "finetune"):
        found, wanted = (column(tmp_path / name / stage, "loss") for name in ("chain", "chain-alone"))
        assert found == pytest.approx(wanted, rel=1e-3), stage

    go(tmp_path / "odd-alone", ODD, odd=4)
    skipped = column(tmp_path / "odd", "skipped")
    assert skipped == column(tmp_path / "odd-alone", "skipped")
    assert 0 < sum(skipped) < 4
    found, wanted = ([v for v in column(tmp_path / name, "loss") if v is not None] for name in ("odd", "odd-alone"))
    assert found == pytest.approx(wanted, rel=1e-3)
    moments = load_file(checkpoint.newest(tmp_path / "odd") / checkpoint.OPTIMIZER_FILE)
    assert {v.item() for name, v in moments.items() if name.endswith("/step")} == {4 - sum(skipped)}

    # What two ranks saved, one goes on with; it then writes what it would have written without them.
    shutil.copytree(tmp_path / "full", tmp_path / "one")
    shutil.rmtree(checkpoint.newest(tmp_path / "one"))
    go(tmp_path / "one", FULL, resume=True)
    assert column(tmp_path / "one", "loss") == pytest.approx(column(tmp_path / "full", "loss"), rel=1e-3)


def test_the_launch_file_is_what_the_plugin_reads(monkeypatch):
    for name, value in launcher_environment("fsdp", 2).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert (plugin.auto_wrap_policy.__name__, plugin.activation_checkpointing) == (
        "transformer_auto_wrap_policy",
        False,
    )


def test_the_ddp_file_asks_for_nothing_but_processes():
    assert "ACCELERATE_USE_FSDP" not in launcher_environment("ddp", 2)


def test_other_ways_to_shard_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="FSDP must be version 2"):
        make_accelerator(TrainConfig(), tmp_path)
