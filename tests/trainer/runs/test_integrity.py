"""What a resumed run or an evaluation reads is what the run began with."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml

from mervcache.errors import StoreDamagedError
from trainer.loop.stages import train_stages
from trainer.loop.train import train
from trainer.recipes import Stage
from trainer.runs import checkpoint
from trainer.runs.export import export_run
from trainer.runs.integrity import RunFiles, seal, unseal
from trainer.runs.load import load_run
from trainer.runs.stage_folders import read_stages

pytestmark = pytest.mark.slow


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def forget_nested_grids(run):
    """As the version wrote it that had no such setting."""
    path = checkpoint.newest(run) / "state.json"
    state = unseal(path)
    assert state["files"]["settings"]["projector"].pop("nested_grids") == []
    path.write_text(seal(state))


CHANGES = {
    "a word of the tokenizer": lambda run: change(run / "llm/tokenizer.json", '"red"', '"rad"'),
    "the norm's epsilon": lambda run: change(run / "llm/config.json", "1e-06", "1e-02"),
    "a template": lambda run: (run / "llm/chat_template.jinja").write_text("{{ messages }}"),
    "a tokenizer's file": lambda run: (run / "llm/tokenizer_config.json").unlink(),
    "the record": lambda run: change(run / "run.json", '"num_samples": 18', '"num_samples": 19'),
    "a setting": lambda run: change(run / "config.yaml", "seed: 7", "seed: 8"),
    "a nested setting": lambda run: change(run / "config.yaml", "weight_decay: 0.0", "weight_decay: 0.1"),
    "a nested setting that is new": lambda run: (
        forget_nested_grids(run),
        change(run / "config.yaml", "nested_grids: []", "nested_grids: [4, 1]"),
    ),
    "a step": lambda run: change(checkpoint.newest(run) / "state.json", '"step": 2', '"step": 3'),
}


@pytest.fixture
def begun(tmp_path, config, samples, tokens):
    """A run of two steps out of six."""
    train(config, samples, tokens, tmp_path / "run", stop_at=2, quiet=True)
    return tmp_path / "run"


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_no_run_to_go_on_with_or_to_load(begun, config, samples, tokens, name):
    CHANGES[name](begun)
    if name == "a setting":  # as the command line does: it reads the settings from the folder
        config = replace(config, seed=8)
    if name == "a nested setting":
        config = replace(config, optimizer=replace(config.optimizer, weight_decay=0.1))
    if name == "a nested setting that is new":
        config = replace(config, projector=replace(config.projector, nested_grids=(4, 1)))
    with pytest.raises(StoreDamagedError, match=r"from a copy|start a new run"):
        train(config, samples, tokens, begun, resume=True, quiet=True)
    with pytest.raises(StoreDamagedError):
        load_run(begun)
    with pytest.raises(StoreDamagedError):
        train(replace(config, init=str(begun)), samples, tokens, begun.with_name("next"), quiet=True)


def test_settings_that_change_no_loss_may_be_changed_in_the_file(begun, config, samples, tokens):
    change(begun / "config.yaml", "log_every: 2", "log_every: 1")
    assert load_run(begun).step == 2
    assert train(replace(config, log_every=1), samples, tokens, begun, resume=True, quiet=True).steps == 6
    assert load_run(begun).step == 6


def test_a_setting_that_a_later_version_has_is_no_change(begun, config, samples, tokens):
    """Such a version writes it to the folder when it resumes, and may be killed before its first checkpoint."""
    forget_nested_grids(begun)
    assert load_run(begun).step == 2
    assert train(config, samples, tokens, begun, resume=True, quiet=True).steps == 6


def test_a_value_that_no_version_takes_is_a_change(begun):
    change(begun / "config.yaml", "clip_norm: 1.0", "clip_norm: much")
    with pytest.raises(StoreDamagedError, match="'clip_norm': 'much'"):
        load_run(begun)


def test_the_digests_are_those_of_the_start_and_not_of_what_is_found_at_a_checkpoint(
    tmp_path, config, samples, tokens, monkeypatch
):
    """A file that changes while the run goes on is found too."""
    save, out = checkpoint.save, tmp_path / "run"

    def save_after_a_change(run, **options):
        CHANGES["a word of the tokenizer"](run)
        return save(run, **options)

    monkeypatch.setattr(checkpoint, "save", save_after_a_change)
    train(config, samples, tokens, out, stop_at=2, quiet=True)
    with pytest.raises(StoreDamagedError, match=r"llm/tokenizer\.json \(changed\)"):
        load_run(out)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_frozen_llm_is_the_one_that_the_run_began_with(tmp_path, config, samples, tokens, pretrained, name):
    frozen, out = replace(config, llm=pretrained, train_llm="none"), tmp_path / "run"
    train(frozen, samples, tokens, out, stop_at=2, quiet=True)
    path = tmp_path / "llm" / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    for use in (load_run, lambda run: train(frozen, samples, tokens, run, resume=True, quiet=True)):
        with pytest.raises(StoreDamagedError, match=f"{name} .changed"):
            use(out)


def test_a_checkpoint_without_digests_is_still_resumed(begun, config, samples, tokens):
    path = checkpoint.newest(begun) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: state[name] for name in state if name not in ("files", "digest", "skipped")}))
    assert train(config, samples, tokens, begun, resume=True, stop_at=4, quiet=True).steps == 4
    assert checkpoint.read_state(checkpoint.newest(begun)).files == RunFiles.of(begun)


def test_a_chain_whose_stages_were_edited_is_refused(tmp_path, config, samples, tokens):
    stages = tuple(Stage(name=name, config=config) for name in ("one", "two"))
    train_stages(stages, lambda _, run: (samples, tokens), tmp_path, only="one", quiet=True)
    assert read_stages(tmp_path) == stages
    settings = yaml.safe_load((tmp_path / "stages.yaml").read_text())
    change(tmp_path / "stages.yaml", "seed: 7", "seed: 8")
    with pytest.raises(StoreDamagedError, match=r"stages\.yaml was changed"):
        read_stages(tmp_path)
    settings.pop("digest")  # as earlier versions wrote it
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(settings))
    assert read_stages(tmp_path) == stages


EXPORT_CHANGES = {
    "a word of the tokenizer": ("llm/tokenizer.json", '"red"', '"rad"'),
    "the norm's epsilon": ("llm/config.json", "1e-06", "1e-02"),
    "a setting": ("config.yaml", "prompt: pure", "prompt: vicuna"),
    "the record": ("run.json", '"num_samples": 18', '"num_samples": 19'),
    "the step": ("export.json", '"step": 2', '"step": 3'),
}


@pytest.mark.parametrize("name", EXPORT_CHANGES)
def test_a_changed_file_is_no_export(begun, tmp_path, name):
    export_run(begun, tmp_path / "given")
    file, old, new = EXPORT_CHANGES[name]
    change(tmp_path / "given" / file, old, new)
    with pytest.raises(StoreDamagedError, match=file.replace(".", r"\.")):
        load_run(tmp_path / "given")


def test_the_card_of_an_export_may_be_edited_and_files_of_others_may_lie_beside_it(begun, tmp_path):
    export_run(begun, tmp_path / "given")
    change(tmp_path / "given/README.md", "license: unknown", "license: mit")
    (tmp_path / "given/.gitattributes").write_text("*.safetensors filter=lfs\n")
    assert load_run(tmp_path / "given").step == 2


def test_an_export_that_covers_weights_alone_is_still_loaded(begun, tmp_path):
    out = tmp_path / "given"
    export_run(begun, out)
    record = json.loads((out / "export.json").read_text())
    record["sha256"] = {name: digest for name, digest in record["sha256"].items() if name.endswith(".safetensors")}
    record.pop("digest")
    (out / "export.json").write_text(json.dumps(record))
    assert load_run(out).step == 2
    shutil.copy(out / "fusion.safetensors", out / "more.safetensors")
    with pytest.raises(StoreDamagedError, match=r"more\.safetensors \(added\)"):
        load_run(out)


def test_a_sealed_record_comes_back_and_one_that_was_changed_does_not(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(seal({"b": [1.5, None], "a": "ü"}))
    assert unseal(path) == {"b": [1.5, None], "a": "ü"}
    change(path, "1.5", "1.25")
    with pytest.raises(StoreDamagedError, match="differs from its digest"):
        unseal(path)
    path.write_text('{"b": 1}')
    assert unseal(path) == {"b": 1}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="got list"):
        unseal(path)
