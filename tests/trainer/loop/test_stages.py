import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
import yaml
from click.testing import CliRunner

from featurestore import StoreWriter
from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.cli import train_main
from trainer.cli_eval import eval_main
from trainer.config import OptimizerConfig, read_config
from trainer.data.tokens import MemoryTokens
from trainer.loop import train as train_rooms
from trainer.loop.stages import describe_stages, merge_settings, train_stages
from trainer.recipes import Stage, get_stages
from trainer.runs.load import load_run
from trainer.runs.run_record import RunRecord, read_metrics
from trainer.runs.stage_folders import STAGES_FILE, last_stage, read_stages

pytestmark = pytest.mark.slow

NAMES = ("align", "finetune")


def losses(run):
    return [row["loss"] for name in NAMES for row in read_metrics(run / name)]


def caption_of(sample):
    """The same clip, described."""
    colour = sample.turns[1].text
    turns = (Turn(role="human", text="Describe it.\n<video>"), Turn(role="gpt", text=f"a {colour} ball"))
    plain = {"category": None, "options": (), "answer_index": None}
    return replace(sample, sample_id=f"c-{sample.sample_id}", turns=turns, stage="align", **plain)


@pytest.fixture
def both(samples):
    """Captions and questions about the same clips."""
    return [*samples, *(caption_of(sample) for sample in samples)]


@pytest.fixture
def stages(config):
    first = replace(config, stage="align", prompt="caption", max_steps=4)
    return (Stage(name="align", config=first), Stage(name="finetune", config=config))


@pytest.fixture
def train_chain(both, tokens, stages, tmp_path):
    """Trains the chain, by default whole."""

    def train(out="whole", source=tokens, samples=both, stages=stages, **options):
        return train_stages(stages, lambda config, run: (samples, source), tmp_path / out, quiet=True, **options)

    return train


class Killing(MemoryTokens):
    """Fails at a fetch, as a process that is killed there."""

    def __init__(self, tokens, samples, at):
        ids = [sample.clip_id for sample in samples]
        super().__init__(ids, tokens.fetch(ids))
        self.left = at

    def fetch(self, clip_ids):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().fetch(clip_ids)


def test_the_second_stage_starts_from_all_weights_of_the_first(train_chain, tmp_path):
    results = train_chain()
    assert [(result.steps, result.num_steps) for result in results] == [(4, 4), (6, 6)]
    first, second = (RunRecord.read(tmp_path / "whole" / name) for name in NAMES)
    assert first.started_from == ""
    assert second.started_from.endswith("(step 4 of 4): loaded projector dinov2, projector vivit, fusion, LLM")
    assert read_config(tmp_path / "whole/finetune").init == str(tmp_path / "whole/align")


def test_a_fresh_llm_knows_the_words_of_all_stages_from_the_first_on(train_chain, tmp_path):
    train_chain()
    align, finetune = (load_run(tmp_path / "whole" / name).built for name in NAMES)
    vocabulary = align.llm.tokenizer.get_vocab()
    assert vocabulary == finetune.llm.tokenizer.get_vocab()
    assert {"ball", "In", "colour", "green"} <= set(vocabulary)


def test_a_chain_killed_anywhere_and_resumed_has_the_same_losses(train_chain, both, tokens, tmp_path):
    train_chain()
    whole = load_run(tmp_path / "whole").built.model.state_dict()
    # Fetches: constants, then two for each of 4 + 6 steps. 1 and 9 come before a stage's first checkpoint.
    for killed_at in (1, 6, 9, 16):
        out = f"parts-{killed_at}"
        with pytest.raises(KeyboardInterrupt):
            train_chain(out, source=Killing(tokens, both[:18], killed_at))
        assert (tmp_path / out / "finetune/config.yaml").exists() == (killed_at >= 9)
        assert [result.steps for result in train_chain(out, resume=True)] == [4, 6]
        assert losses(tmp_path / out) == losses(tmp_path / "whole"), killed_at
        parts = load_run(tmp_path / out).built.model.state_dict()
        assert all(torch.equal(value, parts[name]) for name, value in whole.items()), killed_at


def test_a_stage_lets_its_model_go_before_the_next_one_begins(both, tokens, stages, tmp_path, monkeypatch):
    """Two models with their optimizers would not fit where one does."""
    models, alive = [], []
    before = train_rooms.prepare
    monkeypatch.setattr(
        train_rooms, "prepare", lambda one, model, last: models.append(weakref.ref(model)) or before(one, model, last)
    )

    def open_tokens(config, run):
        alive.append([model() is not None for model in models])
        return both, tokens

    bf16 = tuple(replace(stage, config=replace(stage.config, precision="bf16")) for stage in stages)
    gc.disable()  # nothing but what a stage does at its end
    try:
        train_stages(bf16, open_tokens, tmp_path / "run", quiet=True)
    finally:
        gc.enable()
    assert alive[-1] == [False]


def test_a_chain_that_was_moved_goes_on(train_chain, both, tokens, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_chain("parts", source=Killing(tokens, both[:18], 20))
    (tmp_path / "parts").rename(tmp_path / "moved")
    assert train_chain("moved", resume=True)[-1].steps == 6


def test_a_finished_chain_resumes_without_opening_anything(train_chain, stages, tmp_path):
    before = train_chain()

    def never(config):
        raise AssertionError("nothing is left to read")

    assert train_stages(stages, never, tmp_path / "whole", resume=True) == before


def test_a_finished_stage_is_not_passed_over_under_other_settings(train_chain, stages):
    train_chain()
    other = (replace(stages[0], config=replace(stages[0].config, seed=8)), stages[1])
    with pytest.raises(UserError, match="seed was 7, is 8"):
        train_chain(stages=other, resume=True)


def test_a_chain_is_not_overwritten(train_chain):
    train_chain()
    with pytest.raises(UserError, match="holds align, finetune already; go on with --resume auto"):
        train_chain()


def test_chains_and_single_runs_do_not_share_a_folder(train_chain, stages):
    train_chain("chain")
    train_chain("single", stages=stages[1:])
    with pytest.raises(UserError, match="chain holds a chain of stages, which this recipe is not"):
        train_chain("chain", stages=stages[1:], resume=True)
    with pytest.raises(UserError, match="single holds a run of one stage, which this recipe is not"):
        train_chain("single", resume=True)


def test_samples_missing_for_a_later_stage_are_noticed_before_the_first_step(train_chain, both, tmp_path):
    with pytest.raises(UserError, match=r"no samples of stage 'finetune'.*type --stage align"):
        train_chain(samples=both[18:])
    assert not (tmp_path / "whole/align").exists()


def test_one_stage_of_a_chain_can_be_trained_at_a_time(train_chain, tmp_path):
    with pytest.raises(UserError, match=r"init: .*align has no checkpoint yet; train it first"):
        train_chain(only="finetune")
    assert [result.steps for result in train_chain(only="align", resume=True)] == [4]
    assert [result.steps for result in train_chain(only="finetune", resume=True)] == [6]
    train_chain("at-once")
    assert losses(tmp_path / "whole") == losses(tmp_path / "at-once")
    with pytest.raises(UserError, match="unknown stage of this recipe 'fintune', the nearest known one is 'finetune'"):
        train_chain("other", only="fintune")


def test_a_dry_run_describes_every_stage_and_writes_nothing(both, tokens, stages, tmp_path):
    report = describe_stages(stages, lambda config, run: (both, tokens))["stages"]
    assert list(report) == list(NAMES)
    assert (report["align"]["steps"], report["finetune"]["steps"]) == (4, 6)
    assert report["finetune"]["init"] == "all weights of stage align"
    assert report["align"]["parameters"] == report["finetune"]["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_stages_are_read_back_as_they_were_laid_over(train_chain, stages, tmp_path):
    train_chain()
    assert read_stages(tmp_path / "whole") == stages
    assert last_stage(tmp_path / "whole") == tmp_path / "whole/finetune"
    assert last_stage(tmp_path / "whole/align") == tmp_path / "whole/align"
    assert read_stages(tmp_path / "whole/align")[0].config == stages[0].config


def test_stage_names_that_leave_the_folder_are_refused(tmp_path):
    (tmp_path / STAGES_FILE).write_text("../../elsewhere: {}\n")
    with pytest.raises(UserError, match="plain names"):
        read_stages(tmp_path)


def test_options_win_over_a_stage_of_the_file_and_that_over_the_whole_file():
    settings = {
        "batch_size": 32,
        "optimizer": {"llm_lr": 1e-3, "fusion_lr": 1e-3},
        "stages": {"align": {"batch_size": 64, "seed": 3, "optimizer": {"llm_lr": 5e-4}}},
    }
    first, second = (stage.config for stage in merge_settings(get_stages("merv-full"), settings, {"seed": 9}))
    assert (first.batch_size, second.batch_size) == (64, 32)
    assert (first.seed, second.seed) == (9, 9)
    assert first.optimizer == OptimizerConfig(projector_lr=1e-4, fusion_lr=1e-3, llm_lr=5e-4)
    assert second.optimizer == OptimizerConfig(projector_lr=2e-5, fusion_lr=1e-3, llm_lr=1e-3)


def test_a_prompt_for_a_whole_chain_leaves_captions_alone_and_a_start_is_that_of_the_first_stage():
    first, second = merge_settings(get_stages("merv-full"), {"prompt": "vicuna"}, {"init": "runs/before"})
    assert (first.config.prompt, second.config.prompt) == ("caption", "vicuna")
    assert (first.config.init, second.config.init) == ("runs/before", None)
    own = merge_settings(get_stages("merv-full"), {"stages": {"align": {"prompt": "pure"}}}, {})
    assert own[0].config.prompt == "pure"


def test_settings_of_one_stage_are_those_of_a_recipe_of_one():
    (stage,) = merge_settings(get_stages("merv-frozen"), {"prompt": "vicuna", "stage": "align"}, {"init": "runs/a"})
    whole = get_stages("merv-frozen")[0].config
    assert stage.config == replace(whole, prompt="vicuna", stage="align", init="runs/a")


def test_odd_stages_in_a_file_are_errors():
    full = get_stages("merv-full")
    with pytest.raises(UserError, match="unknown stage in stages 'algin', the nearest known one is 'align'"):
        merge_settings(full, {"stages": {"algin": {}}}, {})
    with pytest.raises(UserError, match="setting stages is a mapping"):
        merge_settings(full, {"stages": ["align"]}, {})
    with pytest.raises(UserError, match="this recipe has its own stages, align, finetune"):
        merge_settings(full, {"stage": "align"}, {})
    with pytest.raises(UserError, match="unknown setting 'batchsize'"):
        merge_settings(full, {"stages": {"align": {"batchsize": 2}}}, {})


@pytest.fixture
def here(tmp_path, monkeypatch, question_store, make_sample):
    """A working folder with a store of captions and questions, and a config of some seconds."""
    writer = StoreWriter.open_or_create(question_store, block_rows={"video": 4, "image": 4})
    writer.add_samples("toy-align", [caption_of(make_sample(index)) for index in range(18)])
    writer.publish_snapshot()
    monkeypatch.chdir(tmp_path)
    small = {
        "llm": "fresh:mini", "projector": {"grid": [2, 2, 2]}, "precision": "fp32", "max_steps": 2, "batch_size": 6,
        "micro_batch_size": 6, "stages": {"align": {"max_steps": 3}},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    return tmp_path


def call(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result


def train_full(*arguments):
    return call(train_main, "--from-cache", "--mode", "full", "--config", "small.yaml", "--json", *arguments)


def test_mode_full_is_one_command_from_captions_to_an_answer(here):
    report = json.loads(train_full("--out", "run", "--resume", "auto").stdout)
    assert [(result["run"], result["steps"]) for result in report["stages"]] == [("run/align", 3), ("run/finetune", 2)]
    assert report["run"] == "run/finetune"
    again = json.loads(call(train_main, "--resume", "run", "--json").stdout)
    assert again == report
    result = call(eval_main, "run", "--checkpoint", "run", "--json")
    assert json.loads(result.stdout)["step"] == 2, result.output


def test_a_stage_of_the_full_mode_and_the_same_samples_of_a_single_recipe(here):
    report = json.loads(train_full("--out", "run", "--stage", "align").stdout)
    assert [result["run"] for result in report["stages"]] == ["run/align"]
    (here / "plain.yaml").write_text("{llm: 'fresh:mini', projector: {grid: [2, 2, 2]}}")
    options = ("--recipe", "demo", "--config", "plain.yaml", "--stage", "align", "--dry-run", "--json")
    single = call(train_main, "--from-cache", *options)
    assert json.loads(single.stdout)["samples"] == 18, single.output
    assert call(eval_main, "run", "--checkpoint", "run").exit_code == 1


def test_a_dry_run_of_the_full_mode_prints_both_stages(here):
    report = json.loads(train_full("--dry-run").stdout)["stages"]
    assert (report["align"]["steps"], report["finetune"]["steps"]) == (3, 2)
    assert report["align"]["memory_bytes"]["moments"] == 2 * report["align"]["memory_bytes"]["gradients"]


def test_mode_full_with_another_recipe_is_an_error(here):
    result = train_full("--recipe", "demo")
    assert result.exit_code == 1
    assert "--mode full is the recipe merv-full; leave out --recipe demo, or --mode" in result.stderr
