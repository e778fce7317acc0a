import subprocess
import sys
import typing

import pytest

from mervcache.config import load_yaml, overlay
from mervcache.errors import UserError
from trainer.config import (
    FUSIONS,
    HEADS,
    RESAMPLERS,
    FusionConfig,
    ProjectorConfig,
    PromptName,
    TrainConfig,
    import_choice,
)
from trainer.data.prompts import PROMPTS
from trainer.recipes import RECIPES, get_recipe


def test_a_config_survives_its_own_yaml(tmp_path, config):
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert overlay(TrainConfig(), load_yaml(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_a_recipe_survives_its_own_yaml(tmp_path, name):
    for stage in RECIPES[name]:
        (tmp_path / "config.yaml").write_text(stage.config.to_yaml())
        assert overlay(TrainConfig(), load_yaml(tmp_path / "config.yaml")) == stage.config


def test_an_unknown_setting_names_the_nearest_known_one():
    with pytest.raises(UserError, match=r"unknown setting 'batchsize', the nearest known one is 'batch_size'"):
        overlay(TrainConfig(), {"batchsize": 4})


def test_an_unknown_nested_setting_is_named_with_its_path():
    with pytest.raises(UserError, match=r"'optimizer.lr_projector', the nearest known one is 'optimizer.projector_lr'"):
        overlay(TrainConfig(), {"optimizer": {"lr_projector": 1.0}})


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"lerning_rate": 1e-3}, "optimizer.projector_lr"),
        ({"projector_lr": 1e-3}, "optimizer.projector_lr"),
        ({"resampeler": "average"}, "projector.resampler"),
        ({"num_train_epoch": 2}, "epochs"),
        ({"optimizer": {"learning_rate": 1e-3}}, "optimizer.projector_lr"),
    ],
)
def test_the_nearest_name_may_be_nested_or_another_trainer_s_word(changes, nearest):
    with pytest.raises(UserError, match=f", the nearest known one is '{nearest}'; known: "):
        overlay(TrainConfig(), changes)


def test_few_of_many_known_names_are_listed():
    with pytest.raises(UserError) as told:
        overlay(TrainConfig(), {"batchsize": 4})
    listed, _, rest = str(told.value).partition("known: ")[2].partition("; ")
    assert len(listed.split(", ")) == 8
    assert {"batch_size", "micro_batch_size"} <= set(listed.split(", "))
    assert rest == "--print-config prints all"
    with pytest.raises(UserError, match=r"known: fusion\.name, fusion\.query_width$"):
        overlay(TrainConfig(), {"fusion": {"nmae": "first"}})


def test_a_nested_name_written_flat_says_how_it_is_written():
    with pytest.raises(UserError, match=r"write optimizer: \{projector_lr: \.\.\.\}"):
        overlay(TrainConfig(), {"optimizer.projector_lr": 1e-3})


def test_a_value_of_the_wrong_type_is_refused():
    with pytest.raises(UserError, match="batch_size must be a whole number, got 'many'"):
        overlay(TrainConfig(), {"batch_size": "many"})
    with pytest.raises(UserError, match="batch_size must be a whole number, got True"):
        overlay(TrainConfig(), {"batch_size": True})


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(UserError, match=r"nearest known one is 'equal_mix'.*known: cross_attention, "):
        overlay(TrainConfig(), {"fusion": {"name": "equalmix"}})


def test_yaml_may_write_a_rate_without_a_dot(tmp_path):
    (tmp_path / "c.yaml").write_text("optimizer: {projector_lr: 2e-3, betas: [0.9, 1e-1]}\n")
    optimizer = overlay(TrainConfig(), load_yaml(tmp_path / "c.yaml")).optimizer
    assert (optimizer.projector_lr, optimizer.betas) == (0.002, (0.9, 0.1))


def test_a_grid_is_three_numbers_or_none():
    assert overlay(ProjectorConfig(), {"grid": [8, 4, 4]}).grid == (8, 4, 4)
    assert overlay(ProjectorConfig(grid=(8, 4, 4)), {"grid": None}).grid is None
    with pytest.raises(UserError, match="grid must be a list of 3 entries"):
        overlay(ProjectorConfig(), {"grid": [8, 4]})


def test_a_frozen_fresh_llm_is_an_error_unless_forced():
    with pytest.raises(UserError, match="frozen random LLM"):
        TrainConfig(llm="fresh:tiny")
    assert TrainConfig(llm="fresh:tiny", allow_fresh_frozen=True).train_llm == "none"


def test_text_only_training_needs_a_trained_llm():
    with pytest.raises(UserError, match="trains nothing"):
        TrainConfig(mode="text-only")


def test_the_paper_recipe_has_the_paper_numbers():
    recipe = get_recipe("merv-frozen")
    assert (recipe.batch_size, recipe.optimizer.projector_lr, recipe.optimizer.fusion_lr) == (128, 1e-3, 1e-3)
    released = get_recipe("merv-frozen-released")
    assert (released.optimizer.projector_lr, released.optimizer.llm_lr) == (2e-5, 2e-5)
    assert (recipe.train_llm, recipe.fusion.name, recipe.projector.head) == ("none", "cross_attention", "linear")


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown recipe 'merv'.*known: merv-frozen"):
        get_recipe("merv")


@pytest.mark.parametrize(("table", "name"), [(t, n) for t in (FUSIONS, HEADS, RESAMPLERS) for n in t])
def test_what_a_table_names_can_be_imported(table, name):
    assert callable(import_choice(table, name))


def test_the_prompt_formats_are_those_that_a_config_may_say():
    assert tuple(PROMPTS) == typing.get_args(PromptName)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusionConfig(name="cross_atention"), "unknown value of fusion.name 'cross_atention'.*cross_attention"),
        (lambda: ProjectorConfig(resampler="avrage"), "unknown value of projector.resampler 'avrage'.*average"),
        (lambda: ProjectorConfig(head="lin"), "unknown value of projector.head 'lin'.*linear"),
    ],
)
def test_a_name_that_no_table_has_is_an_error_with_the_nearest_one(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_config_recipes_and_command_line_import_no_torch():
    code = "import sys, trainer.main, trainer.config; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
