from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from trainer.config import TrainConfig
from trainer.data.tokens import TokenShape
from trainer.runs.model_card import CardFacts, hub_id, model_card, random_parts
from trainer.runs.run_record import RunRecord


@pytest.fixture
def facts():
    shape = TokenShape(grid=(16, 8, 8), width=1024, is_pooled=True, identity="abc123")
    record = RunRecord(
        store="features/demo.zarr",
        data_digest="d" * 64,
        num_samples=1234,
        dropped={"text only": 3},
        shapes={"dinov2": shape},
        parameters={"projectors": {"total": 5000, "trained": 5000}, "llm": {"total": 70000, "trained": 0}},
        num_visual_tokens=1024,
        num_steps=10,
        encoders={"dinov2": {"weights": "pretrained", "identity": {"weights_sha256": "e" * 64, "layer": "block 23"}}},
        software={"torch": "1"},
    )
    return CardFacts(
        name="model",
        config=TrainConfig(),
        record=record,
        step=10,
        llm_weights="Named.",
        llm_revision="1f2e",
        software={"torch": "2", "python": "3"},
    )


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_hub_s_llm_is_the_base_model(facts):
    text = model_card(facts)
    assert front_matter(text) == {
        "license": "unknown",
        "library_name": "merv-pipeline",
        "pipeline_tag": "video-text-to-text",
        "tags": ["video", "multi-encoder", "merv", "cross_attention", "dinov2"],
        "base_model": ["meta-llama/Llama-2-7b-hf"],
    }
    assert "license: unknown  # fill in before you publish it\n" in text
    assert "`meta-llama/Llama-2-7b-hf` at revision `1f2e`" in text
    assert ModelCard(text).data.base_model == ["meta-llama/Llama-2-7b-hf"]


def test_a_hub_id_is_neither_a_folder_nor_fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert [hub_id(llm) for llm in ("org/name-1.5", "gpt2", "models/mine", "./x", "/abs/x", "fresh:tiny", "a/b/c")] == [
        "org/name-1.5",
        "gpt2",
        None,
        None,
        None,
        None,
        None,
    ]


def test_the_newest_parity_check_of_each_encoder_is_named(facts):
    assert "| not checked |" in model_card(facts)
    check = {"verdict": "equal", "time": "2026-11-22T09:00:00Z", "device": "cpu", "machine": "x86_64", "rows": []}
    encoders = {"dinov2": {**facts.record.encoders["dinov2"], "parity": check}}
    text = model_card(replace(facts, record=replace(facts.record, encoders=encoders)))
    assert "| bit-identical on cpu, 2026-11-22 |" in text


def test_nothing_is_called_random_that_was_trained(facts):
    assert random_parts(facts) == [
        "Projectors and fusion started from seed 7 and were trained; the order of the data follows the seed."
    ]
    odd = replace(facts, record=replace(facts.record, encoders={}))
    assert random_parts(odd)[0] == "Encoder dinov2: not recorded whether its weights were trained."
    imported = replace(facts, origin={"source": "elsewhere", "file": "a.pt", "sha256": "f" * 64})
    assert random_parts(imported) == ["Nothing that is recorded."]
    assert "Imported from a checkpoint of elsewhere." in model_card(imported)
    assert "f" * 64 in model_card(imported)


def test_sizes_versions_and_what_was_dropped_are_on_the_card(facts):
    text = model_card(facts)
    assert "projectors 5,000 (5,000 trained); llm 70,000 (0 trained)" in text
    assert "Samples: 1,234; dropped: 3 text only" in text
    assert "| torch | 1 | 2 |" in text
    assert "| python | not recorded | 3 |" in text
    assert "| dinov2 | `abc123` | block 23 | pretrained, sha256 eeeeeeeeeeee | 16x8x8 of width 1024 |" in text
    assert "Not evaluated" in text
    assert "Training loss: not recorded" in text


def test_the_loss_is_a_mean_and_the_llm_s_training_is_described(facts):
    text = model_card(replace(facts, losses=[1.0, 0.5, 0.0], steps_trained=10))
    assert "- Training loss, mean of the last 3 steps: 0.5000\n" in text
    assert "- LLM: frozen (`train_llm: none`); loss `per_token`\n" in text
    assert "stopped early" not in text
    trained = model_card(replace(facts, config=TrainConfig(train_llm="full")))
    assert "- LLM: all weights trained (`train_llm: full`); loss `per_token`\n" in trained
    assert "Without visual tokens" not in trained
    words = model_card(replace(facts, config=TrainConfig(train_llm="full", mode="text-only")))
    assert "- Without visual tokens: the baseline" in words


def test_a_run_that_was_stopped_early_is_marked(facts):
    text = model_card(replace(facts, step=3, steps_trained=4))
    assert "- Steps: 3 of 10, 128 samples each" in text
    assert "- **The run was stopped early, after 4 of 10 steps.**" in text


def test_a_score_names_its_protocol_and_what_it_leaves_out(facts):
    row = {"category": "all", "questions": 8, "accuracy": 0.5, "chance": 0.25, "tied": 0, "unreadable": 2}
    record = {
        "split": "heldout",
        "limit": None,
        "store": "a.zarr",
        "snapshot": "1-a",
        "step": 10,
        "protocol": "letters",
        "scores": [row],
        "beside": {},
        "questions": {"MSVD": {"scored": 8, "open-ended, which are not scored": 9}},
        "template": {"name": "own.txt", "text": "{question}\n{options}"},
    }
    text = model_card(replace(facts, scores=[record], validation={"val_accuracy": 0.25, "val_loss": 2.0}))
    assert "Split `heldout` of `a` by protocol `letters`, snapshot `1-a`" in text
    assert "- Unreadable answers, counted as wrong: 2\n" in text
    assert "- Prompt: `own.txt`: `{question} {options}`\n" in text
    assert "- MSVD: 8 scored, 9 open-ended, which are not scored\n" in text
    assert "- Validation of this checkpoint, val_accuracy by likelihood: 0.2500\n" in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.task_name, result.metric_name) == (
        "multiple choice by letters",
        "accuracy by letters, chance 0.250",
    )


@pytest.mark.parametrize("judge", [None, {"version": "judge-7<b>", "template": {"name": "j.txt", "sha256": "f" * 64}}])
def test_open_ended_scores_name_their_judge(facts, judge):
    judged = {"judge_accuracy": 0.75, "judge_score": 3.25, "judge_unreadable": 1} if judge else {}
    row = {"category": "all", "questions": 8, "exact": 0.125, "normalised": 0.5, "unfinished": 0, **judged}
    record = {
        "split": "heldout",
        "limit": 8,
        "store": "a.zarr",
        "snapshot": "1-a",
        "step": 9,
        "max_new_tokens": 512,
        "judge": judge,
        "scores": {"MSVD|QA": [row]},
        "beside": {"runs/words": {}},
    }
    text = model_card(replace(facts, open_scores=[record]))
    assert "Not evaluated" not in text
    assert "Split `heldout` of `a`, open-ended answers, snapshot `1-a`, the first 8 questions only" in text
    assert "**These are scores of step 9, not of this checkpoint.**" in text
    cells = "| MSVD\\|QA | all | 8 | 0.125 | 0.500 |"
    assert (f"{cells} 0.750 | 3.25 | 1 |" if judge else f"{cells}\n") in text
    assert ("Judge: `judge-7&lt;b>` with the prompt `j.txt`" in text) is bool(judge)


def test_text_from_data_opens_neither_cells_nor_html(facts):
    row = {"category": "a|b\n<script>", "questions": 1, "accuracy": 1.0, "chance": 0.5}
    record = {
        "split": "held\nout<b>",
        "limit": None,
        "store": "a<b>.zarr",
        "snapshot": "1-a",
        "step": 10,
        "scores": [row],
        "protocol": "likelihood",
        "beside": {"runs/words": [row]},
    }
    text = model_card(replace(facts, scores=[record]))
    body = text.split("---\n", 2)[2]
    assert "| a\\|b &lt;script> | 1 | 1.000 | 0.500 | 1.000 |" in body
    assert "| questions about | number | accuracy | chance | words |" in body
    assert "<script" not in body
    assert "<b>" not in body
    assert ModelCard(text).data.eval_results[0].metric_value == 1.0
