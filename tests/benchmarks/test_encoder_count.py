from pathlib import Path

from trainer.ablation.render import read_json, to_json
from trainer.ablation.report_parts import section_plot


def test_its_tables_are_drawn_by_a_page(tmp_path):
    from encoder_count import as_document

    from pipeline.config import read_config

    config = read_config(Path("pipeline/demo.yaml"), {"dataset": "demo"})
    extractions = [
        (count, how, 0.1 * count, 2.0) for count in (1, 2) for how in ("in series, one worker", "on 2 workers")
    ]
    steps = [(count, where, 0.2) for count in (1, 2) for where in ("from the store", "end to end")]
    document = as_document(config, extractions, steps, rounds=1)
    assert "random weights, toy sizes" in document.footnotes[0]
    (tmp_path / "count.json").write_text(to_json(document))
    assert read_json(tmp_path / "count.json") == document
    for section in document.sections:
        assert section_plot(section).count("<polyline") == 2
