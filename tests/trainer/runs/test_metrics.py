import json

from trainer.runs.run_record import open_metrics, read_metrics
from trainer.runs.stage_folders import METRICS_FILE


def test_a_resumed_curve_keeps_the_lines_before_its_start(tmp_path):
    lines = [json.dumps({"step": step}) for step in range(4)]
    (tmp_path / METRICS_FILE).write_text("\n".join([*lines, '{"step": 4, "lo']))
    with open_metrics(tmp_path / METRICS_FILE, 2) as file:
        file.write('{"step": 2, "loss": 0.5}\n')
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1}, {"step": 2, "loss": 0.5}]
