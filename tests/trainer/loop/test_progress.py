import time

import pytest
import torch

from trainer.loop.metrics import MetricsWriter
from trainer.runs.run_record import read_metrics
from trainer.runs.stage_folders import METRICS_FILE


def row(step, **more):
    return {
        "step": step,
        "loss": torch.tensor(0.5),
        "llm_lr": 1e-3,
        "lora_lr": 2e-3,
        "samples": 4,
        "tokens": 40,
        **more,
    }


def progress(run, **options):
    return MetricsWriter(run, start=0, stop=4, is_first_rank=True, **options)


def test_a_person_sees_loss_rate_speed_waiting_and_the_last_validation(tmp_path, capsys):
    with progress(tmp_path) as shown:
        shown.advance(row(0, val_loss=0.25, val_accuracy=0.75, val_chance=0.5))
        shown.advance(row(1))
        shown.flush(waited_s=0.0)
        shown.advance(row(2))
        shown.flush(waited_s=0.0)
    captured = capsys.readouterr()
    for words in ("loss 0.5000", "lr 2.0e-03", "samples/s", "tokens/s", "waits 0%"):
        assert words in captured.err
    assert "held out: loss 0.2500, accuracy 0.75 by likelihood (chance 0.50)" in captured.err
    assert captured.out == ""


def test_a_pause_is_no_steps_time(tmp_path):
    with progress(tmp_path, quiet=True) as shown:
        shown.advance(row(0))
        with shown.paused():
            time.sleep(0.3)
        shown.flush(waited_s=0.0)
    assert read_metrics(tmp_path)[0]["samples_per_s"] > 4 / 0.3


def test_every_written_row_is_passed_to_the_log(tmp_path):
    logged = []
    with progress(tmp_path, quiet=True, log=logged.append) as shown:
        shown.advance(row(0))
        shown.advance(row(1))
        assert logged == []
        shown.flush(waited_s=0.0)
    assert logged == read_metrics(tmp_path)
    assert logged[1]["loss"] == pytest.approx(0.5)


def test_other_ranks_write_nothing(tmp_path):
    with MetricsWriter(tmp_path, start=0, stop=2, is_first_rank=False) as shown:
        shown.advance(row(0))
        shown.flush(waited_s=0.0)
    assert not (tmp_path / METRICS_FILE).exists()
