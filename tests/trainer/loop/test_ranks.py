import pytest
from safetensors.torch import load_file

from trainer.runs import checkpoint
from trainer.runs.run_record import RunRecord, read_metrics

pytestmark = pytest.mark.slow

SCRIPT = """
import atexit
import json
import os
import signal
import sys
from pathlib import Path

import torch
from mervcache.errors import NonFiniteError
from tests.trainer.loop.toy_runs import as_captions, toy_config, toy_questions, toy_tokens, two_stages

from trainer.loop.stages import train_stages
from trainer.loop.train import train

questions, tokens = toy_questions(12), toy_tokens(12)


def single(out):
    train(toy_config(max_steps=6), questions, tokens, out, quiet=True)


def odd(out, stop_at=None, is_resumed=False, limit=10):
    # Clip 4 has an infinite value: one rank sees it, both skip the step.
    plain = {"grid": [1, 2, 2], "standardise": False}
    config = toy_config(max_steps=6, projector=plain, checkpoint_every=2, max_skipped_in_row=limit)
    return train(config, questions, toy_tokens(12, odd=4), out, stop_at=stop_at, resume=is_resumed, quiet=True)


def hopeless(out):
    try:
        odd(out, limit=1)
    except NonFiniteError as error:
        print(error)
        if Path(out, "checkpoints").exists():
            sys.exit("saved")


def chain(out, resume=False, dies=False):
    opened = []

    def open_tokens(config, run):
        opened.append(config.stage)
        if dies and opened.count("finetune") == 2:  # the first time was the look ahead
            os.kill(os.getpid(), signal.SIGKILL)
        return [*questions, *as_captions(questions)], tokens

    stages = two_stages(toy_config(max_steps=4), align_steps=3)
    train_stages(stages, open_tokens, out, resume=resume, quiet=True)


def group_is_left():
    # gloo's threads free tensors, which aborts a process that is ending.
    if torch.distributed.is_initialized():
        print("the process group outlives the run", file=sys.stderr)
        os._exit(9)


if __name__ == "__main__":
    atexit.register(group_is_left)  # runs after what the runs register
    torch.set_num_threads(1)
    for name, options in json.loads(sys.argv[1]):
        {"single": single, "chain": chain, "odd": odd, "hopeless": hopeless}[name](**options)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory, run_here):
    """The script's runs by this process."""
    names, folder = run_here(SCRIPT), tmp_path_factory.mktemp("one")
    names["single"](folder / "single")
    names["chain"](folder / "chain")
    names["odd"](folder / "odd")
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, free_port, run_by_two):
    """The script's runs by two processes at a time: the first two die between the stages of a chain."""
    folder = tmp_path_factory.mktemp("two")
    single, cut, whole = (str(folder / name) for name in ("single", "cut", "whole"))
    first = [("single", {"out": single}), ("chain", {"out": cut, "dies": True})]
    assert all(code != 0 for code, _, _ in run_by_two(folder, SCRIPT, first, free_port))
    assert checkpoint.newest(folder / "cut/align").name == "step-00000003"
    assert not (folder / "cut/finetune").exists()
    then = [("chain", {"out": cut, "resume": True}), ("chain", {"out": whole})]
    ended = run_by_two(folder, SCRIPT, then, free_port)
    assert [code for code, _, _ in ended] == [0, 0], "\n".join(errors for _, _, errors in ended)
    return folder


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
    message = RunRecord.read(together / chain / "finetune").started_from
    assert message.endswith("(step 3 of 3): loaded projector dinov2, fusion, LLM")


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_both_also_across_a_resume(
    alone, tmp_path, free_port, run_by_two
):
    out = str(tmp_path / "odd")
    runs = [
        ("odd", {"out": out, "stop_at": 3}),
        ("odd", {"out": out, "is_resumed": True}),
        ("hopeless", {"out": str(tmp_path / "hopeless")}),
    ]
    ended = run_by_two(tmp_path, SCRIPT, runs, free_port)
    assert [code for code, _, _ in ended] == [0, 0], "\n".join(errors for _, _, errors in ended)
    found, expected = read_metrics(tmp_path / "odd"), read_metrics(alone / "odd")
    assert [row["skipped"] for row in found] == [row["skipped"] for row in expected]
    assert 0 < sum(row["skipped"] for row in found) < 6
    for name in ("loss", "grad_norm"):
        values = [[row[name] for row in rows if not row["skipped"]] for rows in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name
        assert all(row[name] is None for row in found if row["skipped"]), name
    updates = load_file(checkpoint.newest(tmp_path / "odd") / checkpoint.OPTIMIZER_FILE)
    applied = 6 - sum(row["skipped"] for row in found)
    assert {value.item() for name, value in updates.items() if name.endswith("/step")} == {applied}
    said = [text for _, text, _ in ended]
    assert said[0] == said[1]
    assert "the output of projectors.0" in said[0]
