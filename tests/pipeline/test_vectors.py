"""Pooled vectors and near-duplicates, against plain NumPy and an index of another library's making."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from featurestore import Clip, FeatureStore
from featurestore.clips import Sample, Turn
from mervcache.errors import UserError
from pipeline.cli.extract import main
from pipeline.duplicates import find_duplicates
from pipeline.vectors import METADATA, pool_clips, pool_store


def sample(number: int, clip: Clip, stage: str) -> Sample:
    split = "heldout" if stage == "eval" else "train"
    turns = (Turn(role="human", text="What is it?"), Turn(role="gpt", text="A cat."))
    return Sample(sample_id=str(number), clip_id=clip.clip_id, turns=turns, stage=stage, split=split, source="toy")


@pytest.fixture
def store(tmp_path, toy_identity, write_store):
    """Six clips of two encoders: 1 is nearly 0, 4 has the bytes of 3, 5 lacks the second encoder's tokens."""
    rng = np.random.default_rng(0)
    clips = [Clip(dataset="toy", path=f"{number}.mp4", kind="video") for number in range(6)]
    identities = {"one": toy_identity("one", width=6), "two": toy_identity("two", width=4)}
    arrays, media = {}, {}
    for encoder, identity in identities.items():
        tokens = [rng.standard_normal((*identity.grid, identity.width)).astype(np.float16) for _ in clips]
        tokens[1] = tokens[0] + np.float16(0.01)
        tokens[4] = tokens[3]
        for number, clip in enumerate(clips):
            if (encoder, number) != ("two", 5):
                arrays[encoder, clip.clip_id] = {"tokens": tokens[number]}
                media[encoder, clip.clip_id] = f"{3 if number == 4 else number:064x}"
    writer = write_store(
        tmp_path / "toy.zarr", clips, identities, arrays, failed={("two", clips[5].clip_id)}, media=media
    )
    writer.add_samples(
        "toy", [sample(0, clips[0], "finetune"), sample(1, clips[1], "eval"), sample(2, clips[3], "eval")]
    )
    writer.publish_snapshot()
    return FeatureStore.open(tmp_path / "toy.zarr"), clips, arrays


def test_vectors_are_the_means_and_maxima_of_a_clips_tokens(store):
    opened, _, arrays = store
    for pooling, reduce in (("mean", np.mean), ("max", np.max)):
        found = pool_clips(opened, "one", pooling=pooling)
        assert found.clip_ids == tuple(opened.clips["clip_id"].to_pylist())
        for clip_id, vector in zip(found.clip_ids, found.values_CD, strict=True):
            tokens = arrays["one", clip_id]["tokens"].astype(np.float64)
            np.testing.assert_allclose(vector, reduce(tokens, axis=(0, 1, 2)), rtol=1e-5, atol=1e-6)


def test_a_sum_that_float16_cannot_hold_is_pooled_all_the_same(tmp_path, toy_identity, write_store):
    clip = Clip(dataset="toy", path="a.mp4", kind="video")
    identity = toy_identity("one", width=2)
    tokens = np.full((*identity.grid, 2), 60_000, np.float16)
    write_store(
        tmp_path / "s.zarr", [clip], {"one": identity}, {("one", clip.clip_id): {"tokens": tokens}}
    ).publish_snapshot()
    found = pool_clips(FeatureStore.open(tmp_path / "s.zarr"), "one")
    assert found.values_CD.tolist() == [[float(np.float16(60_000))] * 2]


def test_the_table_has_a_row_per_clip_and_nulls_where_tokens_are_missing(store, tmp_path):
    opened, _, _ = store
    result = CliRunner().invoke(main, ["vectors", opened.path, "--out", str(tmp_path / "v.parquet")])
    assert result.exit_code == 0, result.output
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["clip_id"].to_pylist() == opened.clips["clip_id"].to_pylist()
    assert [row is None for row in table["two"].to_pylist()] == [
        clip.endswith("5.mp4") for clip in table["clip_id"].to_pylist()
    ]
    whole = pool_clips(opened, "one").values_CD
    np.testing.assert_array_equal(np.stack(table["one"].to_pylist()), whole)
    record = json.loads(table.schema.metadata[METADATA])
    assert record["snapshot"] == opened.snapshot
    assert record["identities"] == {key: identity.id for key, identity in opened.encoders.items()}


def test_an_encoder_that_the_store_lacks_is_an_error_that_names_those_it_has(store):
    opened, _, _ = store
    with pytest.raises(UserError, match=r"three.*one, two"):
        pool_store(opened, ["three"])
    with pytest.raises(UserError, match=r"three.*one, two"):
        find_duplicates(opened, ["three"])


def test_pairs_are_those_that_plain_numpy_finds(store):
    opened, clips, arrays = store
    found = find_duplicates(opened, threshold=0.9)
    ids = [clip.clip_id for clip in clips[:5]]
    alike = set()
    for encoder in ("one", "two"):
        means = np.stack([arrays[encoder, clip]["tokens"].astype(np.float64).mean(axis=(0, 1, 2)) for clip in ids])
        means -= means.mean(axis=0)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        cosines = means @ means.T
        pairs = {(ids[i], ids[j]) for i in range(5) for j in range(i + 1, 5) if cosines[i, j] >= 0.9}
        alike = pairs if encoder == "one" else alike & pairs
    assert {tuple(sorted((pair.first, pair.second))) for pair in found.pairs} == {tuple(sorted(p)) for p in alike}
    assert {(ids[0], ids[1]), (ids[3], ids[4])} <= alike
    assert (found.clips, found.without) == (5, 1)


def test_leaks_and_equal_media_are_marked(store):
    opened, clips, _ = store
    by_pair = {frozenset((p.first, p.second)): p for p in find_duplicates(opened, threshold=0.95).pairs}
    near = by_pair[frozenset((clips[0].clip_id, clips[1].clip_id))]
    equal = by_pair[frozenset((clips[3].clip_id, clips[4].clip_id))]
    assert near.is_leak
    assert not near.is_exact
    assert equal.is_exact
    assert not equal.is_leak
    assert {frozenset(group) for group in find_duplicates(opened, threshold=0.95).groups()} >= {
        frozenset((clips[3].clip_id, clips[4].clip_id))
    }


def test_the_command_prints_what_the_function_finds(store):
    opened, clips, _ = store
    result = CliRunner().invoke(main, ["duplicates", opened.path, "--threshold", "0.95", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert [pair["first"] for pair in printed["pairs"]] == [
        p.first for p in find_duplicates(opened, threshold=0.95).pairs
    ]
    assert printed["leaks"] == 1
    shown = CliRunner().invoke(main, ["duplicates", opened.path, "--threshold", "0.95"])
    assert clips[1].clip_id in shown.stdout


@pytest.fixture
def leaky(tmp_path, toy_identity, write_store):
    """Seven clips: 0 to 2 alike and 1 scored, 3 trained and scored, 4 to 6 alike and trained on."""
    rng = np.random.default_rng(0)
    clips = [Clip(dataset="toy", path=f"{number}.mp4", kind="video") for number in range(7)]
    identity = toy_identity("one", width=6)
    tokens = [rng.standard_normal((*identity.grid, identity.width)).astype(np.float16) for _ in clips]
    tokens[1] = tokens[2] = tokens[0]
    tokens[5] = tokens[6] = tokens[4]
    arrays = {("one", clip.clip_id): {"tokens": found} for clip, found in zip(clips, tokens, strict=True)}
    writer = write_store(tmp_path / "leaky.zarr", clips, {"one": identity}, arrays)
    trained = [sample(number, clips[number], "finetune") for number in (0, 2, 3, 4, 5, 6)]
    writer.add_samples("toy", [*trained, sample(7, clips[1], "eval"), sample(8, clips[3], "eval")])
    writer.publish_snapshot()
    return FeatureStore.open(tmp_path / "leaky.zarr")


def test_what_to_leave_out_is_the_trained_side_of_leaks_and_of_repeats_all_but_one(leaky):
    found = find_duplicates(leaky)
    assert found.leaked == ("toy/0.mp4", "toy/2.mp4", "toy/3.mp4")
    assert found.repeated == ("toy/5.mp4", "toy/6.mp4")


def test_the_list_is_a_clip_a_line_and_the_next_command_reads_it(leaky, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*options):
        result = CliRunner().invoke(main, ["duplicates", leaky.path, *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    last = run("--threshold", "0.9").splitlines()[-1]
    assert last.endswith(f"merv-pipeline duplicates {leaky.path} --threshold 0.9 --out exclude.txt")
    printed = run("--out", "exclude.txt")
    assert "training clips to leave out: 3 of leaks, 2 more with --dedup" in printed
    assert f"merv-train --from-cache {leaky.path} --exclude exclude.txt" in printed
    assert (tmp_path / "exclude.txt").read_text() == "toy/0.mp4\ntoy/2.mp4\ntoy/3.mp4\n"
    as_json = json.loads(run("--out", "exclude.txt", "--dedup", "--json"))
    listed = (tmp_path / "exclude.txt").read_text().splitlines()
    assert listed == as_json["leaked"] + as_json["repeated"]
    assert len(listed) == 5


def test_dedup_without_a_file_is_an_error(leaky):
    result = CliRunner().invoke(main, ["duplicates", leaky.path, "--dedup"])
    assert result.exit_code == 2
    assert "add --out FILE" in result.stderr


def test_windows_leak_between_the_videos_that_conversations_name(tmp_path, toy_identity, write_store):
    """Windows of 16 s: one of a trained video is like one of a scored video, and one like another of its own video."""
    rng = np.random.default_rng(0)
    windows = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("d", 0)]
    clips = [
        Clip(dataset="toy", path=f"{name}.mp4", kind="video", start_s=16.0 * number, end_s=16.0 * (number + 1))
        for name, number in windows
    ]
    identity = toy_identity("one", width=6, frame_rule="rate-1x16")
    tokens = [rng.standard_normal((*identity.grid, identity.width)).astype(np.float16) for _ in clips]
    tokens[1] = tokens[0]  # within video a
    tokens[3] = tokens[0]  # of video b, which is scored
    tokens[5] = tokens[4]  # of two trained videos
    arrays = {("one", clip.clip_id): {"tokens": found} for clip, found in zip(clips, tokens, strict=True)}
    writer = write_store(tmp_path / "long.zarr", clips, {"one": identity}, arrays)
    videos = {name: Clip(dataset="toy", path=f"{name}.mp4", kind="video") for name in "abcd"}
    stages = {"a": "finetune", "b": "eval", "c": "finetune", "d": "finetune"}
    writer.add_samples("toy", [sample(n, videos[name], stage) for n, (name, stage) in enumerate(stages.items())])
    writer.publish_snapshot()
    found = find_duplicates(FeatureStore.open(tmp_path / "long.zarr"))
    is_leak = {frozenset((pair.first, pair.second)): pair.is_leak for pair in found.pairs}
    assert is_leak == {
        frozenset((clips[0].clip_id, clips[1].clip_id)): False,
        frozenset((clips[0].clip_id, clips[3].clip_id)): True,
        frozenset((clips[1].clip_id, clips[3].clip_id)): True,
        frozenset((clips[4].clip_id, clips[5].clip_id)): False,
    }
    assert (found.leaked, found.repeated) == (("toy/a.mp4",), ("toy/d.mp4",))
