from dataclasses import replace

import pytest
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.config import FusionConfig, LoraConfig
from trainer.loop.plan import describe, make_plan
from trainer.loop.train import train
from trainer.model.llm import FRESH_LLMS, FreshLLM, word_tokenizer
from trainer.model.multiple_choice import answer_all
from trainer.runs.load import load_run


@pytest.mark.parametrize("sampler", ["shuffled", "split_modality"])
def test_what_fills_no_batch_is_reported(config, samples, tokens, make_sample, sampler):
    mixed = [*samples, *(make_sample(index, clip_id=None) for index in range(50, 54))]
    plan = make_plan(replace(config, sampler=sampler, max_steps=None, batch_size=5), mixed, tokens)
    report = describe(plan)
    assert report["unread"] == ({"all": 2} if sampler == "shuffled" else {"text": 4, "visual": 3})
    assert report["steps"] == (4 if sampler == "shuffled" else 3)
    assert report["steps"] * 5 + sum(report["unread"].values()) == report["samples_per_epoch"] == 22


@pytest.mark.parametrize("train_llm", ["none", "full"])
@pytest.mark.parametrize(("steps", "kept"), [(2, 1), (5, 2)])
def test_the_size_of_checkpoints_is_that_of_their_files(
    tmp_path, config, samples, tokens, pretrained, train_llm, steps, kept
):
    config = replace(config, llm=pretrained, train_llm=train_llm, max_steps=steps, checkpoint_every=2)
    config = replace(config, keep_checkpoints=2)
    sizes = describe(make_plan(config, samples, tokens))["checkpoints"]
    train(config, samples, tokens, tmp_path / "run", quiet=True)
    folders = list((tmp_path / "run/checkpoints").iterdir())
    assert len(folders) == sizes["kept"] == kept
    for part, name in (("weights", "model.safetensors"), ("optimizer", "optimizer.safetensors")):
        held = sum(value.nbytes for key, value in load_file(folders[0] / name).items() if not key.endswith("/step"))
        assert sizes[part] == held
    assert sizes["at_most"] == (kept + (kept > 1)) * (sizes["weights"] + sizes["optimizer"])


def test_adapters_learn_from_text_too(config, samples, tokens, make_sample):
    mixed = [*samples, make_sample(50, clip_id=None)]
    lora = replace(config, train_llm="lora", lora=LoraConfig(rank=2), allow_fresh_frozen=True)
    assert describe(make_plan(lora, mixed, tokens))["samples"] == 19


def with_context(monkeypatch, context):
    monkeypatch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=32, num_layers=1, num_heads=2, context=context))


def saying(sample, *words):
    return replace(sample, turns=(sample.turns[0], Turn(role="gpt", text=" ".join(words))))


def test_texts_are_cut_to_what_visual_tokens_leave_and_that_is_logged(config, samples, tokens, caplog):
    caplog.set_level("INFO", "trainer")
    long = [saying(samples[0], *["red"] * 300), *samples[1:]]
    plan = make_plan(config, long, tokens)
    report = describe(plan)
    assert (report["text_limit"], report["cut"], report["without_answer"]) == (120, 1, 0)
    assert (report["longest_sequence"], report["context"]) == (128, 128)
    assert "texts are cut at 120 tokens: of the LLM's context of 128, 8 are visual tokens" in caplog.text
    caplog.clear()
    epoch = [batch for step in range(3) for batch in plan.batches.step(step).micro_batches]
    assert max(batch.attention_mask_BS.shape[1] for batch in epoch) == 128
    make_plan(config, samples, tokens)
    make_plan(replace(config, max_text_tokens=50), long, tokens)
    assert caplog.messages == []


def test_visual_tokens_that_fill_the_context_are_refused_before_the_first_step(
    tmp_path, config, samples, tokens, monkeypatch
):
    with_context(monkeypatch, 47)
    in_a_row = replace(config, fusion=FusionConfig(name="concat_sequence"))
    words = r"16 visual tokens \(fusion concat_sequence of 2 encoders\) leave 31 of the LLM's context of 47 to text"
    with pytest.raises(UserError, match=words):
        train(in_a_row, samples, tokens, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    make_plan(config, samples, tokens)  # mixed, they leave 39
    make_plan(replace(in_a_row, max_text_tokens=31), samples, tokens)
    with_context(monkeypatch, 12)
    with pytest.raises(UserError, match="leave 0 of the LLM's context of 12"):
        make_plan(in_a_row, samples, tokens)


def test_rotary_positions_may_go_beyond_the_context(tmp_path, config, samples, tokens, monkeypatch):
    with_context(monkeypatch, 12)
    beyond = replace(config, fusion=FusionConfig(name="concat_sequence"), exceed_context=True, max_steps=1)
    report = describe(make_plan(beyond, samples, tokens))
    assert (report["longest_sequence"], report["context"], report["text_limit"], report["cut"]) == (28, None, 2048, 0)
    assert train(beyond, samples, tokens, tmp_path / "run", quiet=True).loss > 0
    run = load_run(tmp_path / "run")
    assert len(list(answer_all(run.built, samples[:2], tokens))) == 2


def test_learned_positions_may_not(tmp_path, config, samples, tokens):
    tokenizer = word_tokenizer(["In: What colour is it? Out: red green blue"])
    sizes = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=1)
    GPT2LMHeadModel(sizes).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    learned = replace(config, llm=str(tmp_path / "gpt2"))
    assert describe(make_plan(learned, samples, tokens))["text_limit"] == 64 - 8
    with pytest.raises(UserError, match="exceed_context: true wants rotary positions"):
        make_plan(replace(learned, exceed_context=True), samples, tokens)
