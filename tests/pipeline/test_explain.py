"""What `explain` says of a change: which fields, what stays, what is to be computed and at what price."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner

from featurestore import FeatureStore
from mervcache.errors import UserError
from pipeline.cli.extract import main
from pipeline.explain import explain, explained_config
from pipeline.run_encoders import resolve_weights
from pipeline.summary import changed_versions, past_rate, software_versions

ONE = {"encoders": ("siglip",), "canaries": False}


def told(lab, **changes):
    return explain(lab.store, lab.config(**ONE | changes))


def by_kind(change) -> dict:
    return {cost.kind: cost for cost in change.costs}


def test_where_nothing_changes_nothing_is_to_be_computed(extracted):
    found = explain(extracted.store, extracted.config())
    assert [(change.encoder, change.state, change.fields, change.costs) for change in found.encoders] == [
        (name, "same", {}, ()) for name in extracted.ENCODERS
    ]
    assert {change.weights for change in found.encoders} == {"remembered"}
    assert found.encoders[0].stays == ("the tokens of 14 clips",)
    assert (found.looked_at, found.changed, found.new, found.gone) == (14, (), 0, ())
    assert found.next == ("nothing: the store holds all that these settings need",)


def test_another_grid_names_the_field_and_prices_every_clip_by_past_runs(extracted):
    store = FeatureStore.open(extracted.store)
    ((_, run),) = store.journal()
    found = told(extracted, grid=[4, 3, 3])
    (change,) = found.encoders
    assert (change.state, change.fields) == ("changed", {"grid": ([8, 3, 3], [4, 3, 3])})
    assert found.untouched == ("dinov2", "languagebind", "vivit")
    costs = by_kind(change)
    assert {kind: (cost.missing, cost.stale) for kind, cost in costs.items()} == {"video": (9, 0), "image": (5, 0)}
    stored_bytes, clips = store.stored_bytes(store.encoders["siglip"], "video")
    assert costs["video"].bytes == round(stored_bytes * 4 / 8)
    assert (clips, costs["video"].bytes_from) == (9, "its 9 stored clips, times 0.5")
    made, stages = run["summary"]["made"]["video/siglip"], run["summary"]["stage_s"]
    encode_s = sum(seconds for name, seconds in stages.items() if name.startswith("encode:"))
    assert made["clips"] == 9
    assert costs["video"].seconds == pytest.approx(made["seconds"] * max(1, stages["total"] / encode_s))
    assert costs["video"].seconds_from == "9 clips of 1 run on cpu"
    assert any("training can pool the stored 8x3x3 to 4x3x3 itself" in words for words in change.stays)
    assert any("14 clips under siglip, as they are" in words for words in change.stays)
    assert "extract --new-identity` keeps other tokens of siglip" in found.next[0]


@pytest.mark.parametrize(
    ("grid", "reason"),
    [([8, 2, 2], "those were pooled already, and windows overlap"), ([8, 4, 4], "8x4x4 is finer")],
)
def test_a_grid_that_cannot_be_had_from_the_stored_one_is_said_to_be_so(grid, reason, extracted):
    (change,) = told(extracted, grid=grid).encoders
    assert any("cannot be had from the stored 8x3x3" in words and reason in words for words in change.stays)


def test_a_storage_dtype_is_had_from_no_other_and_other_weights_are_named(extracted):
    (change,) = told(extracted, storage_dtype="bfloat16", weights="random:7").encoders
    assert set(change.fields) == {"storage_dtype", "weights_sha256"}
    assert (change.weights, change.labels) == ("loaded", ("random:0", "random:7"))
    assert any("no storage dtype can be had exactly from another" in words for words in change.stays)
    assert told(extracted, weights="random:7").encoders[0].weights == "remembered"


def test_another_network_has_no_past_and_a_probe_tells(extracted):
    wider = extracted.config(**ONE).architecture["siglip"] | {"hidden_size": 48}
    config = extracted.config(**ONE | {"architecture": {"siglip": wider}, "kind": "image"})
    (change,) = explain(extracted.store, config).encoders
    assert change.fields["architecture.hidden_size"] == (32, 48)
    (cost,) = change.costs
    assert (cost.seconds, cost.seconds_from) == (None, "no run of this store computed it: give --probe 4")
    (probed,) = explain(extracted.store, config, probe=1).encoders[0].costs
    assert probed.seconds > 0
    assert (probed.seconds_from, probed.bytes_from) == ("a probe of 1 clips", "a probe of 1 clips")


def test_media_are_told_that_changed_vanished_came_and_are_listed_no_more(lab):
    lab.copy_of_root()
    videos, images = list(lab.VIDEOS), list(lab.IMAGES)
    lab.annotate(lab.root, videos[:-1], images)
    lab.extract(**ONE)
    lab.annotate(lab.root, videos, images[1:])
    shutil.copy(lab.root / videos[5], lab.root / videos[0])
    (lab.root / videos[1]).unlink()
    found = told(lab)
    assert found.changed == (f"videollava/{videos[0]}",)
    assert found.gone == (f"videollava/{videos[1]}",)
    assert (found.new, found.unlisted, found.looked_at) == (1, 1, 11)
    assert {kind: (cost.missing, cost.stale) for kind, cost in by_kind(found.encoders[0]).items()} == {"video": (1, 1)}
    assert [words.split("`")[1] for words in found.next] == ["merv-pipeline extract", "merv-pipeline extract --refresh"]
    away = lab.root.rename(lab.folder / "elsewhere")
    found = told(lab)
    assert (found.root, found.looked_at) == (None, 0)
    assert "does not exist" in found.problem
    assert explain(lab.store, lab.config(**ONE, root=str(away))).changed == (f"videollava/{videos[0]}",)


def test_weights_that_are_not_here_are_taken_for_the_stored_ones_only_where_a_run_named_them_so(extracted):
    store = FeatureStore.open(extracted.store)
    stored, settings = store.encoders["siglip"], replace(extracted.config(**ONE).encoder_settings[0], weights="/gone")
    run = {"config": {"weights": {"": "/gone"}}, "encoders": {"siglip": {"group": stored.group_name}}}
    wanted = resolve_weights(settings, store, [run])
    assert (wanted.identity.id, wanted.known) == (stored.id, "assumed")
    with pytest.raises(UserError, match="no folder of weights at '/gone'"):
        resolve_weights(settings, store, [])


def test_library_versions_that_made_tokens_are_told_where_they_are_others_than_here():
    here = software_versions()
    run = {"encoders": {"x": {"group": "x-1"}}, "summary": {"clips": 3}, "versions": here | {"torch": "0.1"}}
    idle = run | {"summary": {"clips": 0}, "versions": here | {"torch": "0.2"}}
    assert changed_versions([run, idle], "x-1") == {"torch": {"made with": ["0.1"], "here": here["torch"]}}
    assert changed_versions([run], "x-2") == {}


def test_a_past_rate_is_of_the_newest_device_and_the_same_network(extracted):
    stored = FeatureStore.open(extracted.store).encoders["siglip"]

    def run(device: str, clips: int, seconds: float):
        made = {"video/siglip": {"clips": clips, "seconds": seconds, "bytes": 1}}
        summary = {"made": made, "stage_s": {"encode:siglip": seconds, "total": 2 * seconds}}
        return {"encoders": {"siglip": {"group": stored.group_name, "device": device}}, "summary": summary}

    runs = [run("cpu", 10, 100.0), run("cuda", 10, 2.0), run("cuda", 30, 2.0)]
    rate = past_rate(runs, {stored.group_name: stored}, stored, "video")
    assert (rate.seconds, rate.source) == (8.0 / 40, "40 clips of 2 runs on cuda")
    assert past_rate(runs, {stored.group_name: stored}, stored, "image") is None
    bf16 = replace(stored, compute_dtype="bfloat16")
    assert past_rate(runs, {stored.group_name: stored}, bf16, "video") is None


def test_the_command_takes_what_is_not_given_from_the_newest_run_and_prints_it_for_extract(extracted, tmp_path):
    def call(*arguments):
        result = CliRunner().invoke(main, ["explain", str(extracted.store), *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(call("--json"))
    assert found["settings"] == f"run {extracted.summary.run} of videollava"
    assert [change["state"] for change in found["encoders"]] == ["same"] * 4
    text = call("--encoders", "siglip", "--grid", "4,3,3")
    assert all(
        words in text for words in ("grid", "8x3x3", "4x3x3", "stored with other settings", "14 clips with tokens")
    )
    printed = yaml.safe_load(call("--weights", "siglip=random:7", "--print-config"))
    assert printed["weights"] == {"": "random:0", "siglip": "random:7"}
    assert printed["architecture"]["siglip"]["hidden_size"] == 32
    config, _ = explained_config(extracted.store, None, {"dataset": "demo", "root": str(tmp_path)})
    assert (config.dataset, config.root, config.grid) == ("demo", str(tmp_path), (8, 3, 3))
