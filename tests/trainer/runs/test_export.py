import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from safetensors import safe_open

from mervcache.errors import StoreDamagedError, UserError
from trainer.cli_eval import eval_main
from trainer.config import FusionConfig, LoraConfig
from trainer.data.collate import make_batch
from trainer.evaluate import EvaluationRequest, evaluate_run
from trainer.loop.train import train
from trainer.model.llm import load_llm
from trainer.runs import checkpoint
from trainer.runs.export import export_run
from trainer.runs.load import load_export, load_run
from trainer.runs.run_record import read_metrics
from trainer.sources import open_store


@pytest.fixture
def base(tmp_path):
    """A pretrained LLM as a folder, and what a config needs to name it."""
    torch.manual_seed(0)
    llm = load_llm("fresh:mini", texts=["In: What colour is it?\nOut:", "red green blue"])
    llm.tokenizer.save_pretrained(tmp_path / "base")
    llm.model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make(tmp_path, config, samples, tokens):
    """A run of two steps with these settings."""

    def run(**changes):
        settings = replace(config, max_steps=2, **changes)
        train(settings, samples, tokens, tmp_path / "run", quiet=True)
        return tmp_path / "run"

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def logits(run, samples, tokens):
    """Of the first samples, by the whole model."""
    model = run.built.model
    rendered = [run.built.renderer(sample.turns) for sample in samples[:3]]
    clips = [sample.clip_id if model.has_visual else None for sample in samples[:3]]
    batch = make_batch(rendered, clips, tokens, model.num_visual_tokens, model.context)
    with torch.no_grad():
        return model.llm(inputs_embeds=model.splice(batch), attention_mask=batch.attention_mask_BS).logits


def assert_same_model(run, out, samples, tokens):
    before, after = load_run(run), load_export(out)
    assert torch.equal(logits(before, samples, tokens), logits(after, samples, tokens))
    assert (after.step, after.record.data_digest) == (before.step, before.record.data_digest)
    config = before.built.config  # paths are cut where they are not needed
    assert after.built.config in (config, replace(config, llm=Path(config.llm).name))
    assert not after.built.model.training


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_fresh_llm_is_exported_whole_and_gives_the_same_logits(make, out, samples, tokens):
    run = make()
    report = export_run(run, out)
    assert set(report["files"]) == files(out)
    assert files(out) >= {
        "README.md",
        "config.yaml",
        "encoders.json",
        "export.json",
        "fusion.safetensors",
        "llm/config.json",
        "llm/model.safetensors",
        "llm/tokenizer.json",
        "projectors.safetensors",
        "run.json",
    }
    assert report["llm"] == "whole"
    assert_same_model(run, out, samples, tokens)


@pytest.mark.parametrize("fusion", ["equal_mix", "cross_attention_released", "concat_channel_ln"])
def test_fusions_with_and_without_weights(make, out, samples, tokens, fusion):
    run = make(fusion=FusionConfig(name=fusion, query_width=16))
    export_run(run, out)
    assert (out / "fusion.safetensors").exists() == (fusion != "equal_mix")
    assert_same_model(run, out, samples, tokens)


def test_a_frozen_llm_is_named_and_not_copied(make, out, base, samples, tokens):
    run = make(llm=base, train_llm="none")
    report = export_run(run, out)
    assert report["llm"] == "named"
    assert base in report["notes"][0]  # it cannot be loaded without that folder
    assert not list((out / "llm").glob("*.safetensors"))
    assert (out / "llm/tokenizer.json").is_file()
    assert_same_model(run, out, samples, tokens)


def test_a_frozen_llm_is_copied_on_request_and_the_folder_needs_no_other(make, out, base, samples, tokens):
    run = make(llm=base, train_llm="none", precision="bf16")
    expected = logits(load_run(run), samples, tokens)
    report = export_run(run, out, with_llm=True)
    assert (report["llm"], "notes" in report) == ("whole", False)
    assert base not in "".join(
        path.read_text() for path in out.rglob("*.*") if path.suffix in (".yaml", ".json", ".md")
    )
    shutil.rmtree(base)
    after = load_export(out)
    assert after.built.model.llm.dtype == torch.bfloat16
    assert torch.equal(expected, logits(after, samples, tokens))


def test_a_pretrained_llm_that_was_trained_is_exported_whole(make, out, base, samples, tokens):
    run = make(llm=base, train_llm="full")
    assert export_run(run, out)["llm"] == "whole"
    assert_same_model(run, out, samples, tokens)


def test_text_only_runs_are_exported_too(make, out, samples, tokens):
    run = make(mode="text-only")
    export_run(run, out)
    assert not list(out.glob("*.safetensors"))
    assert_same_model(run, out, samples, tokens)


@pytest.fixture
def lora_run(make, base):
    """Adapters that have moved away from their start, where they add nothing."""
    return make(llm=base, train_llm="lora", lora=LoraConfig(rank=4))


def test_lora_adapters_are_a_folder_that_peft_reads(lora_run, out, base, samples, tokens):
    from peft import PeftModel

    report = export_run(lora_run, out)
    assert report["llm"] == "adapter"
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(report["files"])
    assert not list((out / "llm").glob("*.safetensors"))
    assert_same_model(lora_run, out, samples, tokens)

    ids = torch.tensor([[1, 4, 5, 6]])
    plain = load_llm(base).model.eval()
    with torch.no_grad():
        without = plain(ids).logits
        by_peft = PeftModel.from_pretrained(plain, out / "adapter").eval()(ids).logits
        loaded = load_export(out).built.model.llm(ids).logits
    torch.testing.assert_close(by_peft, loaded)
    assert not torch.allclose(without, loaded)


def test_merged_adapters_make_an_llm_that_needs_neither_base_nor_peft(lora_run, out, base, samples, tokens):
    expected = logits(load_run(lora_run), samples, tokens)
    assert export_run(lora_run, out, merge_lora=True)["llm"] == "whole"
    shutil.rmtree(base)
    after = load_export(out)
    assert not [name for name in after.built.model.state_dict() if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(logits(after, samples, tokens), expected)


def test_what_cannot_be_exported_is_an_error(make, lora_run, out):
    with pytest.raises(UserError, match="whole only with its adapters merged; add --merge-lora"):
        export_run(lora_run, out, with_llm=True)
    shutil.rmtree(lora_run)
    run = make()
    with pytest.raises(UserError, match="the run has train_llm full, so there are no adapters to merge"):
        export_run(run, out, merge_lora=True)
    out.mkdir()
    with pytest.raises(UserError, match="out exists already"):
        export_run(run, out)
    assert not list(out.parent.glob(".tmp-*"))


def test_an_export_can_be_exported_again(make, out, tmp_path, samples, tokens):
    run = make()
    export_run(run, out)
    export_run(out, tmp_path / "again")
    assert_same_model(run, tmp_path / "again", samples, tokens)


def test_large_llms_lie_in_shards(make, out, samples, tokens, monkeypatch):
    monkeypatch.setattr("trainer.runs.export.MAX_SHARD", "40KB")
    run = make()
    report = export_run(run, out)
    assert "llm/model.safetensors.index.json" in report["files"]
    assert len([file for file in report["files"] if file.startswith("llm/model-")]) > 1
    assert_same_model(run, out, samples, tokens)


def test_nothing_in_the_folder_is_a_pickle(make, out):
    export_run(make(), out)
    assert {path.suffix for path in out.rglob("*") if path.is_file()} <= {
        ".json",
        ".md",
        ".safetensors",
        ".yaml",
        ".jinja",
    }
    for path in out.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["projectors.safetensors", "llm/model.safetensors"])
def test_damaged_weights_are_found(make, out, name):
    export_run(make(), out)
    data = bytearray((out / name).read_bytes())
    data[-1] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(StoreDamagedError, match=f"differ from their digests: {name}"):
        load_export(out)


def test_weights_that_were_added_or_lost_are_found(make, out):
    export_run(make(), out)
    shutil.copy(out / "fusion.safetensors", out / "more.safetensors")
    (out / "fusion.safetensors").unlink()
    with pytest.raises(
        StoreDamagedError, match=r"digests: fusion\.safetensors \(missing\), more\.safetensors \(added\)"
    ):
        load_export(out)


def test_another_format_and_no_export_are_refused(make, out, tmp_path):
    export_run(make(), out)
    record = json.loads((out / "export.json").read_text())
    (out / "export.json").write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(UserError, match="no export of this version: format 2"):
        load_export(out)
    with pytest.raises(UserError, match="nothing is no export of this version"):
        load_export(tmp_path / "nothing")


@pytest.fixture
def store_run(tmp_path, config, question_store):
    """A run of a real store, evaluated on all and on some of its questions."""
    samples, source = open_store(str(question_store), config)
    train(replace(config, max_steps=2), samples, source, tmp_path / "run", store=str(question_store), quiet=True)
    evaluate_run(tmp_path / "run", EvaluationRequest())
    evaluate_run(tmp_path / "run", EvaluationRequest(limit=2))
    return tmp_path / "run"


def test_the_folder_is_a_checkpoint_for_every_command(store_run, out, question_store):
    before = evaluate_run(store_run, EvaluationRequest())
    export_run(store_run, out)
    after = evaluate_run(out, EvaluationRequest(store=str(question_store)))
    assert after == before
    assert (out / "scores/heldout.json").is_file()


def test_a_loaded_run_is_one_line_with_its_encoders_and_step(store_run, question_store):
    shown = repr(load_run(store_run))
    assert shown.isprintable()
    assert len(shown) < 300 + len(str(question_store))
    assert [word for word in ("dinov2", "vivit", "step 2", str(question_store)) if word not in shown] == []


def test_encoders_json_holds_every_field_of_the_identities(store_run, out, question_store, config):
    export_run(store_run, out)
    encoders = json.loads((out / "encoders.json").read_text())
    _, source = open_store(str(question_store), config)
    assert list(encoders) == ["dinov2", "vivit"]
    for encoder, shape in source.shapes.items():
        assert encoders[encoder]["identity_id"] == shape.identity
        assert encoders[encoder]["identity"] == source.facts[encoder]["identity"]
        assert encoders[encoder]["weights"] == "random:0"


def test_no_path_of_this_machine_is_given_away(store_run, out, tmp_path):
    export_run(store_run, out)
    for path in out.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path


def test_the_card_holds_scores_data_settings_and_versions(store_run, out):
    export_run(store_run, out, name="My model")
    card = ModelCard.load(out / "README.md")
    text, run = card.text, load_run(store_run)
    assert card.data.library_name == "merv-pipeline"
    assert card.data.pipeline_tag == "video-text-to-text"
    assert {"dinov2", "vivit", "cross_attention"} <= set(card.data.tags)
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    assert run.record.data_digest in text
    for shape in run.record.shapes.values():
        assert shape.identity in text
    assert run.built.config.to_yaml() in text
    losses = [row["loss"] for row in read_metrics(store_run)]
    assert f"Training loss, mean of the last 2 steps: {sum(losses) / 2:.4f}" in text
    assert "stopped early" not in text
    assert "Steps: 2 of 2" in text
    assert f"| torch | {torch.__version__.partition('+')[0]}" in text
    assert "**Encoder dinov2 has seeded random weights (`random:0`): it was never trained.**" in text
    assert "**The LLM (`fresh:mini`) started from fresh weights" in text
    assert "Split `heldout` of `toy`" in text
    assert "the first 2 questions only" in text
    record = json.loads((store_run / "scores/heldout.json").read_text())
    assert record["snapshot"] in text
    assert f"| colour | 3 | {record['scores'][1]['accuracy']:.3f} | 0.333 |" in text
    assert "**To be filled in by who publishes it" in text


def test_the_scores_are_in_the_metadata(store_run, out):
    export_run(store_run, out, license="apache-2.0")
    data = ModelCard.load(out / "README.md").data
    assert data.license == "apache-2.0"
    assert [(r.dataset_name, r.dataset_split, r.metric_type) for r in data.eval_results] == [
        ("toy", "heldout", "accuracy"),
        ("toy", "heldout", "accuracy"),
    ]
    record = json.loads((store_run / "scores/heldout.json").read_text())
    assert record["scores"][0]["accuracy"] in [result.metric_value for result in data.eval_results]


def test_the_three_lines_of_the_card_load_the_model(store_run, out):
    export_run(store_run, out)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("path/to/this/folder", str(out)), names)
    assert names["model"].num_visual_tokens == 8
    assert names["renderer"].tokenizer.eos_token == "</s>"


def test_a_checkpoint_s_own_step_is_on_the_card(store_run, out):
    scores = store_run / "scores/heldout.json"
    scores.write_text(json.dumps({**json.loads(scores.read_text()), "step": 1}))
    export_run(store_run, out)
    assert "**These are scores of step 1, not of this checkpoint.**" in (out / "README.md").read_text()
    assert load_export(out).step == checkpoint.load_state(checkpoint.newest(store_run)).step == 2


def test_the_command_writes_the_folder_and_refuses_what_exists(store_run, out):
    arguments = ["export", "--checkpoint", str(store_run), "--out", str(out), "--license", "mit"]
    result = CliRunner().invoke(eval_main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["files"]) == files(out)
    assert ModelCard.load(out / "README.md").data.license == "mit"
    again = CliRunner().invoke(eval_main, arguments)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    scored = CliRunner().invoke(eval_main, ["run", "--checkpoint", str(out), "--json"])
    assert "no feature store at toy.zarr" in scored.stderr  # where the store lay was not given away


def test_the_run_that_another_one_started_from_is_named_without_its_folder(make, out, tmp_path):
    first = make().rename(tmp_path / "first")
    export_run(make(init=str(first)), out)
    written = "".join(path.read_text() for path in out.rglob("*.*") if path.suffix in (".yaml", ".json", ".md"))
    assert f"weights of {first.name} (step" in written
    assert str(tmp_path) not in written
