import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys

import torch

from featurestore.samples import Sample, Turn
from trainer.overlay import overlay
from trainer.recipes import get_recipe
from trainer.data.tokens import MemoryTokens
from trainer.loop.train import train

torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
clips = [f"set/clip{index}.mp4" for index in range(12)]
tokens = MemoryTokens(clips, {"dinov2": torch.randn(12, 2, 2, 2, 8, generator=random)})
samples = [
    Sample(
        sample_id=f"s{index:02d}",
        clip_id=clip if index % 3 else None,  # every third is text only
        turns=(Turn(role="human", text="What?"), Turn(role="gpt", text="red green blue"[: 3 + index % 2 * 6])),
        stage="finetune",
        source="toy",
    )
    for index, clip in enumerate(clips)
]
changes = {"projector": {"grid": [1, 2, 2]}, "max_steps": 6, "batch_size": 4, "micro_batch_size": 1}
train(overlay(get_recipe("demo"), changes), samples, tokens, sys.argv[1], is_quiet=True)
"""


@pytest.fixture
def run(tmp_path, free_port):
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(num_ranks):
        out = tmp_path / f"ranks-{num_ranks}"
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port),
            "WORLD_SIZE": str(num_ranks),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
        }
        ranks = range(num_ranks) if num_ranks > 1 else [0]
        started = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "script.py"), str(out)],
                env={**os.environ, **({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {})},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ranks
        ]
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return run


def test_two_ranks_have_the_losses_of_one_although_one_may_hold_only_text(run):
    alone, together = run(1), run(2)
    assert [row["step"] for row in together] == list(range(6))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in together] == pytest.approx([row[name] for row in alone], rel=1e-4)
