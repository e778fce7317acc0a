from dataclasses import replace

import pytest

from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.loop.distributed import flat
from trainer.loop.train import train
from trainer.runs.run_record import read_metrics


def logged(run):
    """Tag -> step -> value of everything in a run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers" / "merv-train"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_every_row(tmp_path, config, samples, tokens):
    run = tmp_path / "run"
    train(replace(config, trackers=("tensorboard",)), samples, tokens, run, quiet=True)
    found, rows = logged(run), read_metrics(run)
    for name in ("loss", "grad_norm", "projector_lr", "tokens_per_s", "wait_share"):
        assert found[name] == pytest.approx({row["step"]: row[name] for row in rows}, rel=1e-5), name


def test_a_resumed_run_is_one_curve(tmp_path, config, samples, tokens):
    run, settings = tmp_path / "run", replace(config, trackers=("tensorboard",))
    train(settings, samples, tokens, run, stop_at=3, quiet=True)
    train(settings, samples, tokens, run, resume=True, quiet=True)
    assert sorted(logged(run)["loss"]) == list(range(6))


@pytest.mark.parametrize(("name", "extra"), [("wandb", "track"), ("trackio", "trackio")])
def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_written(
    tmp_path, config, samples, tokens, monkeypatch, name, extra
):
    monkeypatch.setattr("trainer.loop.distributed.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"tracker {name} is not installed: pip install 'merv-pipeline\[{extra}\]'"):
        train(replace(config, trackers=(name,)), samples, tokens, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_settings_are_logged_under_dotted_names():
    found = flat({"a": 1, "b": {"c": None, "d": {"e": (1, 2)}}, "f": {}})
    assert found == {"a": 1, "b.c": "None", "b.d.e": "(1, 2)", "f": "{}"}
    assert not [name for name, value in flat(vars(TrainConfig())).items() if isinstance(value, dict)]
