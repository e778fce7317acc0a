"""The report of an evaluation; test_live_scores.py and runs/test_scores.py evaluate whole runs."""

from trainer.evaluate import report
from trainer.model.multiple_choice import answer_all


def test_a_report_holds_every_run_and_its_answers(brief, samples, tokens):
    answers = list(answer_all(brief.built, samples[:3], tokens))
    told = report(brief, answers, {"text": answers[:2]})
    assert told["scores"][0]["questions"] == 3
    assert told["beside"]["text"][0]["questions"] == 2
    assert [row["sample_id"] for row in told["answers"]] == ["s000", "s001", "s002"]
    assert told["data_digest"] == brief.record.data_digest
