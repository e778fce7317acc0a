"""A run with visual tokens in the place of the placeholder, compared with inputs that are put together by hand."""

from dataclasses import replace

import pytest
import torch

from featurestore.clips import Turn
from trainer.data.collate import make_batch
from trainer.loop.plan import describe, make_plan
from trainer.loop.train import train
from trainer.model.multiple_choice import answer_all
from trainer.runs.load import load_run

TEXTS = {  # question -> text before and behind the visual tokens, as the pure prompt has it
    "<video>\nWhat colour is it?": ("In: ", "\nWhat colour is it?\nOut:"),
    "What colour is <image> it?": ("In: What colour is ", " it?\nOut:"),
    "What colour is it? <video>": ("In: What colour is it? ", "\nOut:"),
    "What colour is it?": ("In: ", "\nWhat colour is it?\nOut:"),
}


@pytest.fixture
def placed(config, samples, tokens, tmp_path):
    """A run on questions of all four kinds and one without a clip, as it is loaded from its folder."""
    questions = list(TEXTS)
    for index, sample in enumerate(samples):
        turns = (Turn(role="human", text=questions[index % 4]), sample.turns[1])
        samples[index] = replace(sample, turns=turns)
    samples[4] = replace(samples[4], clip_id=None)  # its <video> is text
    settings = replace(config, visual_position="placeholder", train_llm="full", max_steps=2)
    train(settings, samples, tokens, tmp_path / "run", quiet=True)
    loaded = load_run(tmp_path / "run")
    assert loaded.built.config.visual_position == "placeholder"
    return loaded


def by_hand(built, sample, answer, tokens):
    """Embeddings [S, M] of one conversation, and the ids of its answer, by the tokenizer, the LLM and torch alone."""
    model, tokenizer = built.model, built.llm.tokenizer

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    table = model.llm.get_input_embeddings().weight
    if sample.clip_id is None:
        before, behind, visual = f"In: {sample.turns[0].text}\nOut:", "", table[:0]
    else:
        before, behind = TEXTS[sample.turns[0].text]
        visual = model.visual_tokens(tokens.fetch([sample.clip_id]))[0][0]
    answered = [*ids(answer), tokenizer.eos_token_id] if answer else []
    text = table[[tokenizer.bos_token_id, *ids(before)]]
    return torch.cat([text, visual, table[ids(behind)], table[answered]]), answered


def log_likelihoods(model, embeddings_SM, answered):
    logs = model.llm(inputs_embeds=embeddings_SM[None]).logits[0].log_softmax(-1)
    first = len(embeddings_SM) - len(answered)
    return torch.stack([logs[first + place - 1, token] for place, token in enumerate(answered)])


@torch.no_grad()
def test_losses_of_every_batch_are_those_of_embeddings_put_together_by_hand(placed, samples, tokens):
    plan = make_plan(placed.built.config, samples, tokens)
    model, seen = plan.built.model.eval(), []
    for step in range(3):
        indices = plan.batches.order.batch(step)
        found = sum(model.sample_losses(batch).sum() for batch in plan.batches.step(step).micro_batches)
        batch = [plan.data.samples[index] for index in indices]
        expected = [by_hand(plan.built, sample, sample.turns[1].text, tokens) for sample in batch]
        torch.testing.assert_close(found, -sum(log_likelihoods(model, *each).sum() for each in expected))
        seen += [sample.sample_id for sample in batch]
    assert sorted(seen) == [sample.sample_id for sample in samples]


def test_a_dry_run_counts_the_texts_that_name_no_place(placed, samples, tokens):
    assert describe(make_plan(placed.built.config, samples, tokens))["without_placeholder"] == 4
    after_bos = replace(placed.built.config, visual_position="after_bos")
    assert describe(make_plan(after_bos, samples, tokens))["without_placeholder"] == 0


@torch.no_grad()
def test_an_evaluation_scores_options_at_that_place(placed, samples, tokens):
    asked = samples[:6]
    answers = list(answer_all(placed.built, asked, tokens, batch_size=4))
    for sample, answer in zip(asked, answers, strict=True):
        expected = [
            float(log_likelihoods(placed.built.model, *by_hand(placed.built, sample, option, tokens)).mean())
            for option in sample.options
        ]
        assert answer.scores == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_generation_goes_on_behind_a_prompt_with_visual_tokens_in_its_middle(placed, samples, tokens):
    built, options = placed.built, {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
    for sample in samples[:4]:
        embeddings_SM, _ = by_hand(built, sample, "", tokens)
        mask = torch.ones(1, len(embeddings_SM), dtype=torch.long)
        expected = built.model.llm.generate(inputs_embeds=embeddings_SM[None], attention_mask=mask, **options)
        rendered = built.renderer.question(sample.turns)
        batch = make_batch([rendered], [sample.clip_id], tokens, built.model.num_visual_tokens, built.model.context)
        assert built.model.generate(batch, **options).tolist() == expected.tolist()
