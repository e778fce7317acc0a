"""Sizes that follow from the number of samples: the rule by hand, and runs that record what was decided."""

from dataclasses import replace

import pytest
import yaml

from mervcache.errors import UserError
from trainer.ablation.sweep import scale_rates
from trainer.config import OptimizerConfig, TrainConfig, read_config
from trainer.loop.plan import make_plan
from trainer.loop.sizes import fit_to_samples, size_warnings
from trainer.loop.stages import merge_settings, to_yaml
from trainer.loop.train import train
from trainer.recipes import get_recipe, get_stages, published

PUBLISHED = published(TrainConfig(optimizer=OptimizerConfig(projector_lr=1e-3, fusion_lr=1e-3, llm_lr=2e-5)))


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "rate"),
    [
        (1, 1, 100, 3.2e-3),  # sqrt(1000 / 100) times the rate
        (3, 2, 67, 3.2e-3),
        (12, 4, 34, 3.1e-3),  # 102 steps
        (119, 4, 4, 2.9e-3),  # 119 steps
        (1000, 8, 1, 2.8e-3),
        (12_800, 128, 1, 3.2e-3),
        (128_000, 128, 1, 1e-3),  # as published
        (702_000, 128, 1, 1e-3),
    ],
)
def test_few_samples_make_small_batches_many_epochs_and_higher_rates(samples, batch, epochs, rate):
    sized = fit_to_samples(PUBLISHED, samples)
    assert (sized.batch_size, sized.epochs, sized.by_samples) == (batch, epochs, {})
    assert sized.optimizer.projector_lr == pytest.approx(rate, rel=1e-9)
    assert sized.optimizer.llm_lr == 2e-5


def test_a_named_size_stays_and_the_others_follow_from_it():
    def named(**given):
        (stage,) = merge_settings(get_stages("merv-frozen"), given, {})
        return fit_to_samples(stage.config, 12)

    batch = named(batch_size=2)
    assert (batch.batch_size, batch.epochs) == (2, 17)
    epochs = named(epochs=50)
    assert (epochs.batch_size, epochs.epochs) == (4, 50)
    steps = named(max_steps=7)
    assert (steps.batch_size, steps.epochs, steps.max_steps) == (4, 1, 7)
    assert steps.optimizer.projector_lr == 4e-3  # at most four times
    rate = named(optimizer={"projector_lr": 5e-4})
    assert (rate.optimizer.projector_lr, rate.batch_size) == (5e-4, 4)
    assert rate.optimizer.fusion_lr > 1e-3


def test_a_value_changed_in_python_is_a_named_one():
    config = get_recipe("merv-frozen")
    sized = fit_to_samples(replace(config, batch_size=6), 12)
    assert (sized.batch_size, sized.epochs) == (6, 50)
    assert sized.optimizer.projector_lr == 3.2e-3  # for 100 steps
    optimizer = replace(config.optimizer, projector_lr=5e-4)
    assert fit_to_samples(replace(config, optimizer=optimizer), 12).optimizer.projector_lr == 5e-4


def test_a_factor_of_all_rates_leaves_them_to_the_number_of_samples():
    (stage,) = scale_rates(get_stages("merv-frozen"), 3.0)
    tripled, plain = fit_to_samples(stage.config, 12).optimizer, fit_to_samples(get_recipe("merv-frozen"), 12).optimizer
    assert tripled.projector_lr == pytest.approx(3 * plain.projector_lr, rel=0.05)  # both are rounded to two digits
    assert tripled.llm_lr == pytest.approx(3 * plain.llm_lr)


def test_a_recipe_that_names_its_sizes_keeps_them(samples, tokens):
    config = replace(get_recipe("demo"), llm="fresh:mini", projector=replace(get_recipe("demo").projector, grid=None))
    assert fit_to_samples(config, 12) == config
    assert make_plan(config, samples, tokens).config.batch_size == 32


def test_ranks_take_equal_shares():
    assert fit_to_samples(PUBLISHED, 119, num_processes=8).batch_size == 8


def test_a_printed_config_is_decided_again():
    stages = get_stages("merv-frozen")
    printed = yaml.safe_load(to_yaml(stages))
    assert merge_settings(stages, printed, {}) == stages
    others = ("epochs", "optimizer.projector_lr", "optimizer.fusion_lr")
    assert merge_settings(stages, printed, {"batch_size": 16})[0].config.undecided == others
    assert merge_settings(stages, printed | {"batch_size": 16}, {})[0].config.undecided == others


def test_only_known_settings_follow_from_the_samples():
    with pytest.raises(UserError, match="batch_size"):
        TrainConfig(by_samples={"batch_siz": 4})


def test_warnings_name_what_to_change():
    few = size_warnings(TrainConfig(batch_size=8), 119, 14)
    assert len(few) == 1
    assert "--epochs" in few[0]
    assert "--batch-size" in few[0]
    assert "--max-steps" in size_warnings(TrainConfig(batch_size=8, max_steps=20), 119, 20)[0]
    assert "more than once" in size_warnings(TrainConfig(batch_size=128, max_steps=60), 12, 60)[0]
    assert size_warnings(TrainConfig(batch_size=8), 800, 100) == []


def test_a_run_records_what_was_decided_and_resumes_with_it(tmp_path, config, samples, tokens):
    undecided = published(replace(config, batch_size=128, epochs=1.0, max_steps=None))
    first = train(undecided, samples, tokens, tmp_path / "run", stop_at=2, quiet=True)
    assert first.num_steps == 103  # 23 epochs of 18 samples, by 4
    recorded = read_config(tmp_path / "run")
    assert (recorded.batch_size, recorded.epochs, recorded.by_samples) == (4, 23, {})
    done = train(undecided, samples, tokens, tmp_path / "run", resume=True, stop_at=4, quiet=True)
    assert (done.steps, done.num_steps) == (4, 103)
    assert read_config(tmp_path / "run") == recorded
    named = replace(undecided, batch_size=2)
    with pytest.raises(UserError, match="batch_size was 4, is 2"):
        train(named, samples, tokens, tmp_path / "run", resume=True, quiet=True)


def test_two_runs_by_samples_are_equal_and_equal_to_one_that_names_the_sizes(tmp_path, config, samples, tokens):
    undecided = replace(config, batch_size=128, max_steps=6, by_samples={"batch_size": 128})
    losses = []
    for name, settings in {"a": undecided, "b": undecided, "c": replace(config, batch_size=4, max_steps=6)}.items():
        losses.append(train(settings, samples, tokens, tmp_path / name, quiet=True).loss)
    assert losses[0] == losses[1] == losses[2]
