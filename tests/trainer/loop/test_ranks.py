import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.loop.progress import read_metrics
from trainer.runs import checkpoint
from trainer.runs.record import RunRecord

SCRIPT = """
import json
import os
import signal
import sys
from dataclasses import replace

import torch

from featurestore.samples import Sample, Turn
from trainer.data.tokens import MemoryTokens
from trainer.loop.stages import train_stages
from trainer.loop.train import train
from trainer.overlay import overlay
from trainer.recipes import Stage, get_recipe

random = torch.Generator().manual_seed(0)
clips = [f"set/clip{index}.mp4" for index in range(12)]
tokens = MemoryTokens(clips, {"dinov2": torch.randn(12, 2, 2, 2, 8, generator=random)})
questions = [
    Sample(
        sample_id=f"s{index:02d}",
        clip_id=clip if index % 3 else None,  # every third is text only
        turns=(Turn(role="human", text="What?"), Turn(role="gpt", text="red green blue"[: 3 + index % 2 * 6])),
        stage="finetune",
        source="toy",
    )
    for index, clip in enumerate(clips)
]
captions = [
    replace(sample, sample_id=f"c-{sample.sample_id}", clip_id=clip, stage="align")
    for sample, clip in zip(questions, clips, strict=True)
]
changes = {"projector": {"grid": [1, 2, 2]}, "max_steps": 6, "batch_size": 4, "micro_batch_size": 1}
config = overlay(get_recipe("demo"), changes)
stages = (
    Stage(name="align", config=replace(config, stage="align", prompt="caption", max_steps=3)),
    Stage(name="finetune", config=replace(config, max_steps=4)),
)


def single(out):
    train(config, questions, tokens, out, is_quiet=True)


def chain(out, resume=False, dies=False):
    opened = []

    def open_tokens(asked):
        opened.append(asked.stage)
        if dies and opened.count("finetune") == 2:  # the first time was the look ahead
            os.kill(os.getpid(), signal.SIGKILL)
        return [*questions, *captions], tokens

    train_stages(stages, open_tokens, out, resume=resume, is_quiet=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, options in json.loads(sys.argv[1]):
        {"single": single, "chain": chain}[name](**options)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The script's runs by this process."""
    names, folder = {"__name__": "script"}, tmp_path_factory.mktemp("one")
    exec(compile(SCRIPT, "script", "exec"), names)
    names["single"](folder / "single")
    names["chain"](folder / "chain")
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, free_port):
    """The script's runs by two processes at a time: the first two die between the stages of a chain."""
    folder = tmp_path_factory.mktemp("two")
    single, cut, whole = (str(folder / name) for name in ("single", "cut", "whole"))
    first = start_two(folder, free_port, [("single", {"out": single}), ("chain", {"out": cut, "dies": True})])
    assert all(code != 0 for code, _ in first)
    assert checkpoint.newest(folder / "cut/align").name == "step-00000003"
    assert not (folder / "cut/finetune").exists()
    then = start_two(folder, free_port, [("chain", {"out": cut, "resume": True}), ("chain", {"out": whole})])
    assert [code for code, _ in then] == [0, 0], "\n".join(errors for _, errors in then)
    return folder


def start_two(folder, port, runs):
    """Those runs, one after the other, by two ranks; the code that each has left with, and what it said."""
    (folder / "script.py").write_text(SCRIPT)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(folder / "script.py"), json.dumps(runs)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    return [(process.returncode, errors) for process, errors in zip(started, said, strict=True)]


def assert_equal_losses(run, wanted, num_steps):
    found, expected = read_metrics(run), read_metrics(wanted)
    assert [row["step"] for row in found] == list(range(num_steps))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-4), name


def test_two_ranks_have_the_losses_of_one_although_one_may_hold_only_text(alone, together):
    assert_equal_losses(together / "single", alone / "single", 6)


@pytest.mark.parametrize("chain", ["whole", "cut"])
def test_a_chain_of_two_ranks_has_the_losses_of_one_also_where_it_was_killed_between_its_stages(alone, together, chain):
    assert_equal_losses(together / chain / "align", alone / "chain/align", 3)
    assert_equal_losses(together / chain / "finetune", alone / "chain/finetune", 4)
    said = RunRecord.read(together / chain / "finetune").started_from
    assert said.endswith("(step 3 of 3): loaded projector dinov2, fusion, LLM")
