import json

import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.slow


def test_a_sweep_takes_the_best_projector_rate_to_the_fusion_and_writes_one_table(tmp_path, question_store, llm_folder):
    from learning_rates import main

    out = tmp_path / "sweep"
    arguments = ["--store", question_store, "--llm", llm_folder, "--prompt", "pure", "--grid", "2,2,2", "--out", out]
    small = ["--steps", 12, "--batch-size", 4, "--jobs", 1, "--projector-rates", "1e-6,1e-2", "--fusion-rates", "1e-4"]
    result = CliRunner().invoke(main, [str(word) for word in [*arguments, *small]], catch_exceptions=False)
    assert result.exit_code == 0
    runs = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/measured.json")}
    losses = {run["projector_lr"]: run["validation_loss"] for run in runs.values() if run["fusion_lr"] != 1e-4}
    best = min(losses, key=losses.get)
    assert set(runs) == {
        "projector-1e-06-fusion-1e-06",
        "projector-0.01-fusion-0.01",
        f"projector-{best:g}-fusion-0.0001",
    }
    assert losses[1e-2] < losses[1e-6]  # a rate that moves nothing learns nothing
    lines = (out / "table.md").read_text().splitlines()
    assert lines[2].startswith("| no visual tokens | - | - | - | ")
    assert len([line for line in lines if line.startswith("| ")]) == 5  # heading, LLM alone, three runs


def test_validation_loss_is_the_mean_over_questions_and_accuracy_counts_hits():
    from learning_rates import judged

    answers = [
        {"category": "colour", "scores": [-1.0, -2.0], "correct": 0, "credit": 1.0},
        {"category": "colour", "scores": [-1.0, -4.0], "correct": 1, "credit": 0.0},
        {"category": "shape", "scores": [-3.0, -1.0], "correct": 1, "credit": 1.0},
    ]
    found = judged(answers)
    assert found["validation_loss"] == pytest.approx((1 + 4 + 1) / 3)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["by_category"] == {"colour": 0.5, "shape": 1.0}
