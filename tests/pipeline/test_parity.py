"""The parity check: what a machine makes of the canaries, beside what the store holds."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from featurestore import FeatureStore, verify_store
from featurestore.objects.open import open_objects
from featurestore.quality import keep_record, parity_words, read_parity
from featurestore.records import driver_runs
from featurestore.reference_clips import ReferenceClips, read_reference_clips
from featurestore.storage_dtypes import STORAGE_DTYPES
from featurestore.writer import StoreWriter
from mervcache.errors import MediaError, StoreFormatError, UserError
from pipeline.cli.extract import main
from pipeline.decode import decoders, resize
from pipeline.decode.pool import DecodePool
from pipeline.encoders import loading
from pipeline.parity import TOLERANCES, check_parity, compare


class InThisProcess(DecodePool):
    """Decodes where the test is: starting a process costs a second, and its libraries cannot be changed from here."""

    def submit(self, job):
        future = Future()
        try:
            future.set_result(decoders.decode_clip(job))
        except MediaError as error:
            future.set_exception(error)
        return future


@pytest.fixture
def store(extracted, tmp_path, monkeypatch):
    """A copy of the finished store that a test may write to."""
    monkeypatch.setattr("pipeline.worker.engine.DecodePool", InThisProcess)
    return shutil.copytree(extracted.store, tmp_path / "copy.zarr")


@pytest.fixture
def verdicts(store):
    def check(*encoders: str, **options) -> dict[str, str]:
        record = check_parity(store, encoders=encoders, device="cpu", **options)
        return {f"{row.encoder} {row.kind}": f"{row.frames} {row.verdict}" for row in record.rows}

    return check


def test_the_machine_that_made_them_makes_them_again_to_the_bit(extracted):
    record = check_parity(extracted.store, device="cpu")
    assert len(record.rows) == 2 * len(extracted.ENCODERS)
    for row in record.rows:
        assert (row.frames, row.verdict, row.max_abs, row.relative, row.cosine_min) == ("equal", "equal", 0, 0, 1)
        assert row.tolerance == pytest.approx(TOLERANCES["float32"] + STORAGE_DTYPES["float16"].step)


def test_other_weights_are_refused_by_their_digest(extracted):
    stored = FeatureStore.open(extracted.store).encoders["dinov2"].weights_sha256[:12]
    with pytest.raises(UserError, match=f"tokens were made with {stored}.*--weights dinov2=SPEC"):
        check_parity(extracted.store, encoders=["dinov2"], weights={"dinov2": "random:1"}, device="cpu")


def test_an_encoder_that_drifted_is_found_though_its_weights_have_the_same_digest(verdicts, monkeypatch):
    """As a library would: what is loaded is the same, what is computed is not."""
    real = loading.Encoder.encode

    def drifted(self, frames, **options):
        features_BTHWD, prefix_BTKD = real(self, frames, **options)
        return features_BTHWD * 1.02, prefix_BTKD

    monkeypatch.setattr(loading.Encoder, "encode", drifted)
    assert verdicts("siglip") == {"siglip video": "equal outside", "siglip image": "equal outside"}


def test_one_weight_changed_after_loading_is_found(verdicts, monkeypatch):
    real = loading.fill_weights

    def fill(network, source):
        real(network, source)
        monkeypatch.setattr(network, "finish", lambda finish=network.finish: (finish(), _spoil(network)), raising=False)

    monkeypatch.setattr(loading, "fill_weights", fill)
    assert verdicts("dinov2", "vivit") == {
        f"{name} {kind}": "equal outside" for name in ("dinov2", "vivit") for kind in ("video", "image")
    }


def _spoil(network) -> None:
    weight = next(p for p in network.parameters() if p.ndim > 2)
    with torch.no_grad():
        weight.view(-1)[0] += 5


def test_another_resize_filter_is_told_from_a_drift_of_the_encoder(verdicts, monkeypatch):
    assert set(verdicts("siglip").values()) == {"equal equal"}
    monkeypatch.setitem(resize.PILLOW_FILTERS, "bicubic", Image.Resampling.BOX)
    assert set(verdicts("siglip").values()) == {"differ outside"}


def test_another_batch_shape_is_within_tolerance(store, verdicts):
    for document in (store / "video").glob("languagebind-*/zarr.json"):
        text = document.read_text()
        document.write_text(text.replace('"batch_shape": 2', '"batch_shape": 3'))
        assert document.read_text() != text
    assert verdicts("languagebind")["languagebind video"] in ("equal equal", "equal within")


def test_tokens_that_another_machine_made_are_measured(store, extracted):
    """A hand-made file: the stored tokens moved by a known amount."""
    identity = FeatureStore.open(store).encoders["siglip"]
    rewrite(store, identity, lambda tokens: tokens * np.float16(1.25))
    (row,) = [r for r in check_parity(store, encoders=["siglip"], device="cpu").rows if r.kind == "video"]
    assert row.verdict == "outside"
    assert row.relative == pytest.approx(0.2, rel=1e-3)  # |t - 1.25 t| / |1.25 t|
    assert row.cosine_min == pytest.approx(1, abs=1e-6)


def rewrite(store, identity, change) -> None:
    """Other canaries of the same encoder, and a snapshot that names them."""
    file = store / "canaries" / "video" / f"{identity.group_name}.safetensors"
    before = read_reference_clips(open_objects(store), "video", identity)
    after = replace(before, arrays={name: change(items) for name, items in before.arrays.items()})
    file.write_bytes(after.to_bytes())
    StoreWriter.open(store).publish_snapshot(anew=True)


def test_repair_computes_lost_canaries_again_to_the_digest_that_they_had(store):
    from featurestore.maintenance.repair import repair_store
    from pipeline.recompute import Recompute

    file = next((store / "canaries" / "video").glob("vivit-*"))
    data = file.read_bytes()
    file.write_bytes(data[:-30] + bytes(30))
    again = Recompute(store, root=None, weights=None, device="cpu")
    (done,) = repair_store(store, recompute=again, make_reference_clips=again.canaries)
    assert (done.key, done.done) == (file.relative_to(store).as_posix(), "computed again")
    assert file.read_bytes() == data


def test_pictures_of_another_version_are_not_compared(store):
    identity = FeatureStore.open(store).encoders["siglip"]
    file = store / "canaries" / "video" / f"{identity.group_name}.safetensors"
    before = ReferenceClips.parse(file.read_bytes(), "video", identity)
    file.write_bytes(replace(before, rendering="canaries/9").to_bytes())
    with pytest.raises(UserError, match="this version has 'canaries/1'"):
        check_parity(store, encoders=["siglip"], device="cpu")
    clips = (replace(before.clips[0], media_sha256="0" * 64), before.clips[1])
    file.write_bytes(replace(before, clips=clips).to_bytes())
    with pytest.raises(StoreFormatError, match="reference clip scene is another file here"):
        check_parity(store, encoders=["siglip"], device="cpu")


def test_a_store_without_canaries_says_what_to_do(store):
    shutil.rmtree(store / "canaries")
    StoreWriter.open(store).publish_snapshot(anew=True)
    with pytest.raises(UserError, match="run its `merv-pipeline extract` again, which adds them"):
        check_parity(store, device="cpu")


def test_an_encoder_of_monstrous_size_is_not_built(store):
    from featurestore.identity import FeatureIdentity
    from pipeline.parity import load_as_stored

    identity = FeatureStore.open(store).encoders["siglip"]
    huge = FeatureIdentity.from_dict(
        {**identity.to_dict(), "architecture": {**identity.architecture, "num_layers": 10**9}}
    )
    StoreWriter.open(store).ensure_group("video", huge, batch_shape=2, weights_label="random:0", new_identity=True)
    with pytest.raises(StoreFormatError, match="more than any encoder has"):
        load_as_stored(open_objects(store), "siglip", huge, {}, "cpu")


def test_real_clips_of_the_store_are_encoded_again_and_others_refused(store, extracted, tmp_path):
    ids = FeatureStore.open(store).clips["clip_id"].to_pylist()
    listed = tmp_path / "clips.txt"
    listed.write_text("\n".join(ids[:3] + ids[-1:]))
    record = check_parity(store, encoders=["dinov2"], clips=listed, device="cpu")
    assert {(row.kind, row.clips, row.verdict, row.frames) for row in record.rows} == {
        ("video", 3, "equal", "not compared"),
        ("image", 1, "equal", "not compared"),
    }
    media = extracted.root / ids[0].split("/", 1)[1]
    elsewhere = tmp_path / "media" / media.relative_to(extracted.root)
    elsewhere.parent.mkdir(parents=True)
    shutil.copy(extracted.root / ids[1].split("/", 1)[1], elsewhere)
    listed.write_text(ids[0])
    with pytest.raises(UserError, match="are not those that its tokens were made from"):
        check_parity(store, encoders=["dinov2"], clips=listed, root=str(tmp_path / "media"), device="cpu")
    listed.write_text("nothing/here.mp4")
    with pytest.raises(UserError, match="unknown clip"):
        check_parity(store, clips=listed, device="cpu")


def test_the_result_is_kept_and_the_newest_about_todays_canaries_is_read(store):
    assert parity_words(read_parity(FeatureStore.open(store))["vivit"]) == "not checked"
    record = check_parity(store, encoders=["vivit"], device="cpu")
    keep_record(store, record)
    worse = replace(
        record, time="2099-01-01T00:00:00Z", rows=(replace(record.rows[0], verdict="outside", relative=0.5),)
    )
    keep_record(store, worse)
    checks = read_parity(FeatureStore.open(store))
    assert parity_words(checks["vivit"]) == "OUTSIDE TOLERANCE, relative error 5.0e-01 on cpu, 2099-01-01"
    assert parity_words(checks["siglip"]) == "not checked"
    other = replace(worse, time="2100-01-01T00:00:00Z", rows=(replace(record.rows[0], canaries="0" * 64),))
    keep_record(store, other)
    assert read_parity(FeatureStore.open(store))["vivit"]["time"] == "2099-01-01T00:00:00Z"
    assert verify_store(store, "full") == []


FULL_ROW = {
    **dict.fromkeys(("encoder", "identity", "canaries"), "x"),
    "kind": "video",
    "frames": "equal",
    **dict.fromkeys(("max_abs", "relative", "cosine_min", "tolerance", "cosine_tolerance"), 0.0),
    "verdict": "equal",
}
STRANGE = (
    {"device": "<script>"},
    {"time": "soon"},
    {"rows": [{"encoder": "vivit"}]},
    {"rows": 3},
    {"rows": [FULL_ROW | {"clips": 10**400}]},
    {"versions": {"torch": "x" * 101}},
    {"versions": 7},
    {"format": 9},
)


def test_a_strangers_record_that_is_not_ours_counts_for_nothing(store):
    key = keep_record(store, check_parity(store, encoders=["siglip"], device="cpu"))
    record = json.loads((store / key).read_text())["record"]
    (store / key).unlink()
    for number, change in enumerate(STRANGE):
        StoreWriter.open(store).journal(f"parity-strange-{number}", record | change)
    assert read_parity(FeatureStore.open(store))["siglip"] == {"verdict": "not checked"}
    StoreWriter.open(store).journal("parity-ours", record)
    assert read_parity(FeatureStore.open(store))["siglip"]["verdict"] == "equal"


def test_figures_are_those_of_plain_arithmetic(extracted):
    identity = replace(FeatureStore.open(extracted.store).encoders["siglip"], grid=(1, 1, 2), width=2)
    theirs = {"tokens": np.array([[[[3, 4], [1, 0]]]], np.float16)}
    mine = {"tokens": np.array([[[[3, 4.5], [0, 1]]]], np.float16)}
    row = compare("siglip", "video", identity, [(theirs, theirs), (theirs, mine)])
    assert (row.clips, row.max_abs, row.cosine_min, row.verdict) == (2, 1.0, 0.0, "outside")
    assert row.relative == pytest.approx(((0.25 + 1 + 1) / 26) ** 0.5)
    nudged = {"tokens": np.nextafter(theirs["tokens"], np.float16(9))}
    assert compare("siglip", "video", identity, [(theirs, nudged)]).verdict == "within"
    overflowed = compare("siglip", "video", identity, [(theirs, None)])
    assert (overflowed.relative, overflowed.verdict) == (None, "outside")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_stored_values_that_are_no_numbers_are_outside_and_can_be_kept(extracted, value):
    identity = replace(FeatureStore.open(extracted.store).encoders["siglip"], grid=(1, 1, 2), width=2)
    theirs = {"tokens": np.array([[[[value, 4], [1, 0]]]], np.float16)}
    mine = {"tokens": np.array([[[[3, 4], [1, 0]]]], np.float16)}
    row = compare("siglip", "video", identity, [(theirs, mine), (mine, mine)])
    assert (row.max_abs, row.relative, row.cosine_min, row.verdict) == (None, None, None, "outside")
    assert json.dumps(asdict(row), allow_nan=False)


def test_the_command_prints_verdicts_keeps_them_and_fails_outside_tolerance(store):
    run = CliRunner().invoke(main, ["verify", str(store), "--parity", "--encoders", "siglip", "--device", "cpu"])
    assert run.exit_code == 0, run.output
    assert "bit-identical" in run.stdout
    assert len(list((store / "journal").glob("parity-*"))) == 1
    identity = FeatureStore.open(store).encoders["siglip"]
    rewrite(store, identity, lambda tokens: tokens * np.float16(2))
    run = CliRunner().invoke(
        main, ["verify", str(store), "--parity", "--encoders", "siglip,", "--device", "cpu", "--json"]
    )
    assert run.exit_code == 1
    rows = json.loads(run.stdout)["parity"]["rows"]
    assert {row["kind"]: row["verdict"] for row in rows} == {"video": "outside", "image": "equal"}
    misused = CliRunner().invoke(main, ["verify", str(store), "--encoders", "siglip"])
    assert "add --parity" in misused.output


def test_report_and_card_tell_the_newest_check(store, tmp_path):
    from featurestore.transfer.dataset_card import card
    from pipeline.report import write_report

    keep_record(store, check_parity(store, encoders=["siglip"], device="cpu"))
    assert "bit-identical on cpu" in write_report(store, out=tmp_path / "page.html", num_clips=1).read_text()
    text = card(FeatureStore.open(store), place="hf://x/y")
    assert "- siglip: bit-identical on cpu" in text
    assert "- vivit: not checked" in text


def test_a_strangers_number_of_threads_is_refused_by_parity_and_by_repair(store):
    from featurestore.maintenance.repair import repair_store
    from pipeline.recompute import Recompute

    run = driver_runs(open_objects(store))[-1]
    encoders = {name: entry | {"threads": 10**6} for name, entry in run["encoders"].items()}
    later = run | {"started": run["started"] + 1, "encoders": encoders}
    StoreWriter.open(store).journal("later-driver", later)
    with pytest.raises(UserError, match="was computed with 1000000 threads"):
        check_parity(store, encoders=["siglip"], device="cpu")
    shard = next((store / "video").glob("siglip-*/tokens/c/0/0/0/0/0"))
    shard.write_bytes(bytes(shard.stat().st_size))
    (left,) = repair_store(store, recompute=Recompute(store, root=None, weights=None, device="cpu"))
    assert not left.is_mended
    assert left.done.startswith("cannot be computed again: ")
    assert "was computed with 1000000 threads" in left.done
