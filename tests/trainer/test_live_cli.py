"""Which words of `merv-train` go together when tokens are made on the spot."""

import json

import pytest
import yaml
from click.testing import CliRunner

from mervcache.errors import UserError
from trainer.cli import pop_live_options, resolve_source, train_main
from trainer.config import LiveRequest

NOTHING = {
    "end_to_end": False,
    "dataset": None,
    "root": None,
    "encoders": None,
    "weights": (),
    "extract_config": None,
    "skip_media_check": False,
}


def train(*arguments):
    return CliRunner().invoke(train_main, [str(argument) for argument in arguments])


def test_the_words_of_an_extraction_become_a_request():
    options = {**NOTHING, "end_to_end": True, "dataset": "demo", "weights": ("random:0",), "encoders": "siglip, dinov2"}
    place = resolve_source(None, pop_live_options(options))
    assert place == LiveRequest(settings={"dataset": "demo", "weights": ("random:0",)})
    assert options == {"encoders": ["siglip", "dinov2"]}  # what a run from a store may say too


def test_a_resumed_run_goes_on_with_the_source_of_its_record():
    settings = {"dataset": "demo", "root": "/old", "decoder": "frames/1"}
    recorded = {"store": "", "live": {**settings, "trust_media": True}}
    assert resolve_source(None, {**NOTHING}, recorded) == LiveRequest(settings=settings, is_trusted=True)
    moved = resolve_source(None, {**NOTHING, "end_to_end": True, "root": "/new"}, recorded)
    assert moved.settings == {**settings, "root": "/new"}


@pytest.mark.parametrize(
    ("store", "given", "message"),
    [
        (None, {}, "no source of tokens.*or --end-to-end --dataset NAME"),
        ("features/a.zarr", {"end_to_end": True}, "--from-cache or --end-to-end, not both"),
        (
            "features/a.zarr",
            {"dataset": "demo", "weights": ("hub",)},
            "--dataset, --weights .* give --end-to-end",
        ),
        (None, {"skip_media_check": True}, "--skip-media-check .* give --end-to-end"),
    ],
)
def test_words_that_do_not_go_together_are_errors(store, given, message):
    with pytest.raises(UserError, match=message):
        resolve_source(store, {**NOTHING, **given})


def test_end_to_end_without_a_dataset_asks_for_one():
    result = train("--end-to-end", "--recipe", "demo")
    assert result.exit_code == 1
    assert "which dataset? give --dataset NAME" in result.stderr


def test_a_dry_run_counts_what_cannot_be_decoded_and_writes_nothing(tmp_path, media_lab, media_root):
    file = tmp_path / "extract.yaml"
    file.write_text(yaml.safe_dump(media_lab.settings(media_root)))
    result = train(
        *("--end-to-end", "--extract-config", file, "--encoders", "siglip", "--recipe", "demo"),
        *("--projector", "3d-average", "--out", tmp_path / "run", "--dry-run", "--json"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["samples"], report["dropped"]) == (7, {"clip without tokens of every encoder": 1})
    assert report["encoders"] == {"siglip": [4, 2, 2, 32]}
    assert not (tmp_path / "run").exists()
