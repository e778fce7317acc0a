import pytest

from mervcache.errors import UserError
from trainer.config import FULL_RECIPE, MODE_FULL, RECIPES, get_recipe, get_stages


def test_the_full_recipe_trains_captions_and_then_instructions_with_the_paper_numbers():
    align, finetune = get_stages("merv-full")
    assert (align.name, finetune.name) == ("align", "finetune")
    first, second = align.config, finetune.config
    assert (first.stage, first.prompt, first.train_llm) == ("align", "caption", "full")
    assert (second.stage, second.prompt, second.train_llm) == ("finetune", "pure", "full")
    for config, rate, batch in ((first, 1e-4, 256), (second, 2e-5, 128)):
        optimizer = config.optimizer
        assert (optimizer.projector_lr, optimizer.fusion_lr, optimizer.llm_lr) == (rate, rate, rate)
        assert (config.batch_size, optimizer.weight_decay, config.epochs) == (batch, 0.0, 1.0)


def test_the_released_recipe_does_what_the_released_code_does():
    config = get_recipe("merv-frozen-released")
    assert (config.train_llm, config.optimizer.weight_decay) == ("full", 0.1)
    assert (config.loss, config.sampler) == ("micro_batch_means", "split_modality")


def test_only_released_recipes_have_the_released_loss():
    odd = {name for name, stages in RECIPES.items() if any(s.config.loss != "per_token" for s in stages)}
    assert odd == {"merv-frozen-released"}


def test_a_chain_is_not_one_config():
    with pytest.raises(UserError, match="recipe merv-full has stages align, finetune"):
        get_recipe("merv-full")


def test_the_full_mode_names_a_recipe():
    assert MODE_FULL == "full"
    assert len(get_stages(FULL_RECIPE)) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_stage_names_can_be_folders_and_differ(name):
    names = [stage.name for stage in get_stages(name)]
    assert len(set(names)) == len(names)
    assert all(stage.isidentifier() for stage in names)
