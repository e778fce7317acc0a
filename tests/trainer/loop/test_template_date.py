"""A run whose chat template writes today's date: begun on one day, resumed and scored on another."""

from dataclasses import replace
from datetime import datetime

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from trainer.loop.train import train
from trainer.model.multiple_choice import answer_all
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics

TEMPLATE = (
    "<s>{{ {'07': 'red', '08': 'green', '09': 'blue'}[strftime_now('%d')] }} "
    "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
)


@pytest.fixture
def on_day(monkeypatch):
    """Sets the clock that transformers gives to templates."""

    def move(day):
        class Then(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 12, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Then)

    return move


@pytest.fixture
def dated(config, pretrained):
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(pretrained)
    return replace(config, llm=pretrained, prompt="chat_template", template_date="2026-12-07", max_steps=4)


def test_a_run_goes_on_and_is_scored_with_the_day_that_it_began_with(dated, samples, tokens, tmp_path, on_day):
    on_day(7)
    train(dated, samples, tokens, tmp_path / "whole", quiet=True)
    train(dated, samples, tokens, tmp_path / "halves", stop_at=2, quiet=True)
    on_day(8)
    train(dated, samples, tokens, tmp_path / "halves", resume=True, quiet=True)
    whole, halves = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "halves"))
    assert halves == whole
    loaded = load_run(tmp_path / "halves")
    assert loaded.built.config.template_date == "2026-12-07"
    text = loaded.built.llm.tokenizer.decode(list(loaded.built.renderer.question(samples[0].turns).input_ids))
    assert text.startswith("<s> red ")
    scores = [answer.scores for answer in answer_all(loaded.built, samples[:4], tokens)]
    on_day(9)
    assert [answer.scores for answer in answer_all(load_run(tmp_path / "halves").built, samples[:4], tokens)] == scores
    other = replace(dated, template_date="2026-12-08")
    train(other, samples, tokens, tmp_path / "other", quiet=True)
    assert [row["loss"] for row in read_metrics(tmp_path / "other")] != whole  # the day matters to this template
