"""What storage dtypes cost and lose, on a store's own tokens: against plain numpy and torch, and where it is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from featurestore.clips import Clip
from featurestore.quality import (
    STORED,
    LossRecord,
    LossRow,
    TokenRecord,
    keep_record,
    parse_record,
    read_distortion,
    to_record,
)
from featurestore.store import FeatureStore
from featurestore.transfer.dataset_card import card
from featurestore.transfer.sync import push
from featurestore.writer import StoreWriter
from mervcache.errors import StoreFormatError, UserError
from pipeline.cli.extract import main
from pipeline.distortion import measure_distortion
from pipeline.report import write_report

IDS = [f"set/{n}.mp4" for n in range(4)]


def tokens_of(number: int) -> np.ndarray:
    """float32 [4, 2, 2, 8] with channels of unlike scale, and what float16 holds exactly."""
    values = np.random.default_rng(number).standard_normal((4, 2, 2, 8)) * np.array([1, 1, 1, 1, 10, 10, 0.1, 0])
    return values.astype(np.float16).astype(np.float32)


@pytest.fixture
def write(toy_identity, write_store) -> Callable[..., Path]:
    """Makes a store of one block: `write(path, arrays, storage_dtype, prefix_tokens=...)`."""

    def make(path: Path, arrays: list[np.ndarray], storage_dtype: str = "float16", prefix_tokens: int = 0) -> Path:
        identity = toy_identity("dinov2", prefix_tokens=prefix_tokens, storage_dtype=storage_dtype)
        clips = [Clip(dataset="set", path=f"{n}.mp4", kind="video") for n in range(len(arrays))]
        prefix = {"prefix": np.ones((4, prefix_tokens, 8), np.float32)} if prefix_tokens else {}
        values = {
            ("dinov2", clip.clip_id): {"tokens": array} | prefix for clip, array in zip(clips, arrays, strict=True)
        }
        write_store(path, clips, {"dinov2": identity}, values, block_rows=len(arrays)).publish_snapshot()
        return path

    return make


@pytest.fixture
def store(write, tmp_path) -> Path:
    return write(tmp_path / "s.zarr", [tokens_of(n) for n in range(4)])


def by_dtype(record) -> dict:
    return {row.dtype: row for row in record.rows}


def test_errors_are_those_of_a_plain_cast(store):
    rows = by_dtype(measure_distortion(store))
    wanted = np.stack([tokens_of(n) for n in range(4)]).astype(np.float64)
    low, high = (f(wanted, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    scale = np.where(high > low, (high - low) / 255, 1)
    casts = {
        "float16": wanted,  # what the store holds
        "bfloat16": torch.from_numpy(wanted).to(torch.bfloat16).double().numpy(),
        "uint8": np.rint((wanted - low) / scale) * scale + low,
    }
    for dtype, cast in casts.items():
        dots, norms = (cast * wanted).sum(-1), np.linalg.norm(cast, axis=-1) * np.linalg.norm(wanted, axis=-1)
        rms = np.sqrt(np.square(cast - wanted).sum() / np.square(wanted).sum())
        assert rows[dtype].max_abs == pytest.approx(np.abs(cast - wanted).max(), rel=1e-4)
        assert rows[dtype].relative_rms == pytest.approx(rms, rel=1e-4)
        assert rows[dtype].cosine_min == pytest.approx(np.min(dots / norms), abs=1e-7)
    assert (rows["float16"].max_abs, rows["float16"].cosine_min) == (0, 1)
    assert [row.is_stored for row in rows.values()] == [True, False, False]
    assert rows["bfloat16"].max_abs > 0 < rows["uint8"].max_abs


def test_bytes_are_those_of_a_store_of_that_dtype(write, store, tmp_path):
    rows = by_dtype(measure_distortion(store))
    for dtype, row in rows.items():
        twin = write(tmp_path / f"{dtype}.zarr", [tokens_of(n) for n in range(4)], dtype)
        on_disk = sum(file.stat().st_size for file in (twin / "video").glob("*/*/c/**/*") if file.is_file())
        assert row.bytes_per_clip == on_disk / 4
        assert min(row.clips_s, row.mb_s, row.of_raw) > 0


def test_the_sample_is_drawn_by_the_seed_and_told(store, monkeypatch):
    drawn = []
    real = FeatureStore.read
    monkeypatch.setattr(
        FeatureStore, "read", lambda self, ids, **o: drawn.append((self.path, tuple(ids))) or real(self, ids, **o)
    )

    def sample(seed):
        drawn.clear()
        record = measure_distortion(store, sample=2, seed=seed)
        assert (record.sample, record.seed, record.rows[0].clips) == (2, seed, 2)
        return {clip for path, ids in drawn if path == str(store) for clip in ids}

    first = sample(0)
    assert sample(0) == first
    assert len({frozenset(sample(seed)) for seed in range(3)} | {frozenset(first)}) > 1


def test_clips_that_overflow_a_dtype_are_counted_and_left_out(write, tmp_path):
    large = [tokens_of(0), tokens_of(1) + 1e5]
    rows = by_dtype(measure_distortion(write(tmp_path / "s.zarr", large, "bfloat16")))
    assert [(row.clips, row.refused) for row in rows.values()] == [(1, 1), (2, 0), (2, 0)]
    rows = by_dtype(measure_distortion(write(tmp_path / "t.zarr", [large[1]], "bfloat16")))
    assert (rows["float16"].clips, rows["float16"].bytes_per_clip, rows["float16"].max_abs) == (0, None, None)


def test_stills_prefix_tokens_and_every_encoder_are_measured_and_nothing_is_left_behind(write, extracted, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    record = measure_distortion(extracted.store, sample=2, scratch=scratch)
    measured = {(row.encoder, row.kind, row.dtype) for row in record.rows}
    encoders = FeatureStore.open(extracted.store).encoders
    assert measured == {
        (e, k, d) for e in encoders for k in ("video", "image") for d in ("float16", "bfloat16", "uint8")
    }
    assert all(row.max_abs == 0 for row in record.rows if row.is_stored)
    assert list(scratch.iterdir()) == []
    prefixed = write(tmp_path / "p.zarr", [tokens_of(0)], prefix_tokens=2)
    plain = write(tmp_path / "q.zarr", [tokens_of(0)])
    more = [by_dtype(measure_distortion(place))["uint8"].bytes_per_clip for place in (prefixed, plain)]
    assert more[0] > more[1]


def test_against_the_encoders_own_float32_the_stored_dtype_has_its_rounding_too(extracted, media_root, tmp_path):
    shutil.copytree(extracted.store, tmp_path / "s.zarr")
    asked = ["distortion", str(tmp_path / "s.zarr"), "--sample", "2", "--reference", "encoders", "--json"]
    done = CliRunner().invoke(main, [*asked, "--root", str(media_root)])
    assert done.exit_code == 0, done.output
    record = parse_record(json.loads(done.stdout), "printed")
    assert record.reference == "encoders"
    by_key = {(row.encoder, row.kind, row.dtype): row for row in record.rows}
    for (encoder, kind, dtype), row in by_key.items():
        bound = {"float16": 2**-11, "bfloat16": 2**-8, "uint8": 1}[dtype]
        assert 0 < row.relative_rms < bound
        assert row.relative_rms >= by_key[encoder, kind, "float16"].relative_rms
    made = tmp_path / "other"
    shutil.copytree(media_root, made, symlinks=True)
    for file in made.glob("*/*.mp4"):
        file.write_bytes(file.read_bytes() + b"x")
    refused = CliRunner().invoke(main, [*asked, "--root", str(made)])
    assert "are not those that its tokens were made from" in refused.output


def test_the_command_keeps_what_it_prints_and_report_and_card_show_it(store, tmp_path):
    opened = FeatureStore.open(store)
    assert "not measured; run `merv-pipeline distortion STORE`" in card(opened, place="x")
    assert "not measured: run merv-pipeline distortion" in write_report(store, out=tmp_path / "r.html").read_text()
    done = CliRunner().invoke(main, ["distortion", str(store), "--sample", "2", "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert read_distortion(opened).tokens == parse_record(printed, "printed")
    loss = LossRecord(
        time="2026-11-22T09:00:00Z",
        snapshot=opened.snapshot,
        run="first",
        step=7,
        split="heldout",
        samples=5,
        weights="random:0",
        rows=(
            LossRow(dtype=STORED, loss=2.0, by_modality={"video": 2.0}),
            LossRow(dtype="uint8", loss=2.5, by_modality={}),
        ),
    )
    keep_record(store, to_record(loss))
    shown = [card(opened, place="x"), write_report(store, out=tmp_path / "r.html").read_text()]
    for text in shown:
        assert "float16 (stored)" in text
        assert "+0.50000" in text
        assert "not measured" not in text
        assert text.count("Tokens of seeded random weights, not trained ones") == 2
    table = CliRunner().invoke(main, ["distortion", str(store), "--sample", "1"]).output
    assert "Errors are against what the store holds" in table


def test_the_newest_record_counts_and_travels_without_the_journals(store, tmp_path):
    record = to_record(measure_distortion(store, sample=1))
    for time, sample in (("2026-01-02T00:00:00Z", 2), ("2026-01-01T00:00:00Z", 1)):
        keep_record(store, record | {"time": time, "sample": sample})
    StoreWriter.open(store).journal("run-1", {"host": "here"})
    push(store, tmp_path / "there.zarr", with_journal=False)
    there = FeatureStore.open(tmp_path / "there.zarr")
    assert read_distortion(there).tokens.sample == 2
    assert {name.split("-")[0] for name, _ in there.journal()} == {"distortion"}
    assert "on at most 2 clips" in (tmp_path / "there.zarr/README.md").read_text()


def test_a_store_that_is_only_read_is_measured_all_the_same(store, web):
    push(store, web.folder / "s.zarr")
    done = CliRunner().invoke(main, ["distortion", f"{web.url}/s.zarr", "--sample", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sample"] == 1
    assert "not saved in the store: http" in done.stderr


def test_a_store_without_tokens_says_what_is_missing(tmp_path):
    writer = StoreWriter.open_or_create(tmp_path / "s.zarr")
    writer.publish_snapshot()
    with pytest.raises(UserError, match="no committed tokens yet"):
        measure_distortion(tmp_path / "s.zarr")


CRAFTED = [
    {"format": 2},
    {"measure": "speed"},
    {"measure": []},
    {"rows": "many"},
    {"rows": [{"encoder": "x"}]},
    {"time": "yesterday"},
    {"reference": "guess"},
    {"reference": []},
    {"seed": 10**400},
    {"seed": "x" * 300},
    {"extra": 1},
]


def test_a_stranger_s_record_is_checked_and_passed_over(store):
    record = to_record(measure_distortion(store, sample=1))
    assert type(parse_record(record, "good")) is TokenRecord
    for number, change in enumerate(CRAFTED):
        with pytest.raises(StoreFormatError, match="journal bad"):
            parse_record(record | change, "bad")
        StoreWriter.open(store).journal(f"distortion-bad{number}", record | change)
    assert read_distortion(FeatureStore.open(store)).tokens is None  # no push fails for them


def test_a_damaged_journal_fails_no_report_of_the_measurement(store):
    key = keep_record(store, to_record(measure_distortion(store, sample=1)))
    (store / key).write_bytes((store / key).read_bytes()[:-9])
    assert read_distortion(FeatureStore.open(store)).tokens is None
