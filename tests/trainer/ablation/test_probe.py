"""Probes of stores that are made so that it is known who can read the labels."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from featurestore import Clip, FeatureStore
from featurestore.clips import Sample, Turn
from featurestore.storage_dtypes import STORAGE_DTYPES
from mervcache.errors import UserError
from tests.trainer.ablation.conftest import entry, make_answer
from trainer.ablation.document import NotComputed
from trainer.ablation.probe import probe
from trainer.main import eval_main

pytestmark = pytest.mark.slow

KINDS = ("jump", "run", "sit")
DRAWS = 200
T, H, W = GRID = (2, 2, 2)


def clips_of(count, spans=1):
    """`count` clips; `spans` of them are of one video."""
    ends = [None] if spans == 1 else [float(index + 1) for index in range(spans)]
    return [
        Clip(dataset="set", path=f"v{index // spans:03d}.mp4", kind="video", start_s=end and end - 1, end_s=end)
        for index in range(count)
        for end in [ends[index % spans]]
    ]


def noise(seed, count, grid=GRID, width=6):
    return np.random.default_rng(seed).standard_normal((count, *grid, width))


def with_label(tokens, labels):
    """Tokens with a channel for each class, whose mean is lifted by 4."""
    lifted = tokens.copy()
    for clip, label in zip(lifted, labels, strict=True):
        clip[..., KINDS.index(label)] += 4
    return lifted


@pytest.fixture
def make_store(tmp_path, toy_identity, write_store):
    """Writes one of `tokens`: encoder, or (encoder, layer) -> [N, T, H, W, D]."""

    def make(clips, tokens, name="probe.zarr", samples=(), failed=(), **fields):
        identities, arrays = {}, {}
        for key, found in tokens.items():
            encoder, layer = key if isinstance(key, tuple) else (key, "last")
            sizes = {"grid": found.shape[1:4], "width": found.shape[4], **fields.get(encoder, {})}
            identities[key] = toy_identity(encoder, layer=layer, still_period=found.shape[1], **sizes)
            for clip, each in zip(clips, found.astype(np.float16), strict=True):
                arrays[key, clip.clip_id] = {"tokens": each}
        writer = write_store(tmp_path / name, clips, identities, arrays, failed=failed)
        if samples:
            writer.add_samples("questions", list(samples))
        writer.publish_snapshot()
        return str(tmp_path / name)

    return make


@pytest.fixture
def labelled(make_store):
    """A store of 60 clips whose labels `reads` can read and `blind` cannot, and the labels."""
    clips = clips_of(60)
    labels = {clip.clip_id: KINDS[index % 3] for index, clip in enumerate(clips)}
    tokens = {"reads": with_label(noise(0, 60), labels.values()), "blind": noise(1, 60, width=4)}
    return make_store(clips, tokens), labels


def accuracies(report, name="linear"):
    return {"+".join(row.encoders): row.accuracy for row in report.rows if row.probe == name}


def call(*words):
    return CliRunner().invoke(eval_main, ["probe", *map(str, words)])


def write_labels(path, rows, heading=("clip_id", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heading, *rows])
    return path


def test_both_probes_find_the_encoder_that_reads_the_labels(labelled):
    store, labels = labelled
    report = probe(store, labels, draws=DRAWS)
    for name in ("linear", "attentive"):
        found = accuracies(report, name)
        assert found["reads"] >= 0.95
        assert found["blind+reads"] >= 0.9
        assert found["blind"] < 0.6
    assert report.rows[0].accuracy == max(row.accuracy for row in report.rows)
    assert report.rows[-1].encoders == ("blind",)
    assert report.majority == pytest.approx(1 / 3)
    assert (report.classes, report.videos) == ({"jump": 20, "run": 20, "sit": 20}, 60)
    for row in report.rows:
        assert 0 <= row.low <= row.accuracy <= row.high <= 1
        right = [predicted == labels[clip] for clip, predicted in zip(report.clips, row.predicted, strict=True)]
        assert row.accuracy == pytest.approx(np.mean(right))


def test_balanced_accuracy_is_the_mean_over_classes(labelled):
    store, labels = labelled
    few = {clip: label for index, (clip, label) in enumerate(labels.items()) if label != "sit" or index < 24}
    (row,) = probe(store, few, subsets=["blind"], probes=["linear"], draws=DRAWS).rows
    clips = sorted(few)
    shares = [
        np.mean([row.predicted[n] == kind for n, clip in enumerate(clips) if few[clip] == kind]) for kind in KINDS
    ]
    assert row.balanced_accuracy == pytest.approx(np.mean(shares))
    assert row.balanced_accuracy != pytest.approx(row.accuracy)


def test_what_only_attention_reads_is_found_by_the_attentive_probe_alone(make_store):
    """One of 32 tokens is marked and holds the class; the rest hold what brings its mean to 0."""
    random, places, count = np.random.default_rng(4), 32, 240
    labels = np.array([-1.0, 1.0])[random.integers(0, 2, count)]
    tokens = random.standard_normal((count, places, 4)) * 0.3
    for clip, label in enumerate(labels):
        marked = random.integers(places)
        others = random.standard_normal(places)
        others[marked] = 0
        others -= others.sum() / (places - 1) + label / (places - 1)
        others[marked] = label
        tokens[clip, :, 1], tokens[clip, :, 0] = others, 0
        tokens[clip, marked, 0] = 1
    clips = clips_of(count)
    store = make_store(clips, {"hidden": tokens.reshape(count, 2, 4, 4, 4)})
    report = probe(store, {c.clip_id: f"{label:+.0f}" for c, label in zip(clips, labels, strict=True)}, draws=DRAWS)
    assert accuracies(report)["hidden"] < 0.65
    assert accuracies(report, "attentive")["hidden"] > 0.85


def test_a_video_stays_in_one_fold(make_store):
    """Clips of a video are equal and have a label by chance: learning one gives away the others."""
    random = np.random.default_rng(5)
    of_video = random.integers(0, 2, 40)
    clips = clips_of(120, spans=3)
    tokens = np.repeat(random.standard_normal((40, *GRID, 64)), 3, axis=0)
    labels = {clip.clip_id: KINDS[of_video[index // 3]] for index, clip in enumerate(clips)}
    report = probe(make_store(clips, {"toy": tokens}), labels, draws=DRAWS)
    assert report.videos == 40
    assert all(row.accuracy < 0.75 for row in report.rows)
    for row in report.rows:
        by_video = {}
        for clip, predicted in zip(report.clips, row.predicted, strict=True):
            by_video.setdefault(clip.partition("#")[0], set()).add(predicted)
        assert all(len(each) == 1 for each in by_video.values())


def test_the_same_command_gives_the_same_numbers_whatever_the_order_of_the_labels(labelled, tmp_path):
    store, labels = labelled
    one = write_labels(tmp_path / "one.csv", labels.items())
    other = write_labels(tmp_path / "other.csv", reversed(labels.items()))
    words = ["--subsets", "blind", "--format", "csv", "--labels"]
    first, again, turned = (call(store, *words, path) for path in (one, one, other))
    assert first.exit_code == 0, first.stderr
    assert first.stdout == again.stdout == turned.stdout.replace("other.csv", "one.csv")
    assert call(store, *words, one, "--seed", 1).stdout != first.stdout


def test_labels_that_cannot_be_used_are_counted_and_said(labelled, tmp_path):
    store, labels = labelled
    rows = [*labels.items(), ("set/gone.mp4", "run"), ("set/other.mp4", "sit"), ("set/none.mp4", ""), ("x", "nan")]
    rows[0] = (rows[0][0], "only once")
    result = call(store, "--labels", write_labels(tmp_path / "l.csv", rows), "--probes", "linear", "--subsets", "reads")
    assert result.exit_code == 3
    for what in (
        "2 labelled clips that are not in the store",
        "2 lines without a clip or a label",
        "1 clips of 1 class with less than 2 videos",
    ):
        assert f"left out: {what}" in result.stderr
    assert "59 clips of 59 videos" in result.stdout


def test_missing_labels_of_parquet_are_counted(labelled, tmp_path):
    store, labels = labelled
    values = [float(KINDS.index(label)) for label in labels.values()]
    values[:3] = [float("nan"), None, 2.0]
    pq.write_table(pa.table({"label": values, "clip_id": list(labels)}), tmp_path / "l.parquet")
    report = probe(store, tmp_path / "l.parquet", subsets=["reads"], probes=["linear"], draws=DRAWS)
    assert report.left_out == {"lines without a clip or a label": 2}
    assert set(report.classes) == {"0", "1", "2"}
    assert report.rows[0].accuracy > 0.9


def test_tokens_that_are_not_finite_are_left_out_and_said(make_store, monkeypatch):
    """Our writer quarantines such clips; a store by another one may hold them."""
    clips = clips_of(30)
    labels = {clip.clip_id: KINDS[index % 3] for index, clip in enumerate(clips)}
    broken = with_label(noise(0, 30), labels.values())
    broken[4, 1, 0, 1, 3], broken[7, 0, 0, 0, 0] = np.nan, np.inf
    with monkeypatch.context() as patched:
        unchecked = replace(STORAGE_DTYPES["float16"], to_stored=lambda tokens: {"tokens": tokens})
        patched.setitem(STORAGE_DTYPES, "float16", unchecked)
        store = make_store(clips, {"broken": broken, "whole": noise(1, 30)})
    report = probe(store, labels, subsets=["alone"], draws=DRAWS)
    assert report.left_out == {"clips whose tokens are not finite (broken 2)": 2}
    assert len(report.clips) == 28
    assert not {clips[4].clip_id, clips[7].clip_id} & set(report.clips)
    assert accuracies(report)["broken"] > 0.9


def test_all_probes_see_the_clips_that_have_every_encoder(make_store):
    clips = clips_of(30)
    labels = {clip.clip_id: KINDS[index % 3] for index, clip in enumerate(clips)}
    tokens = {"one": noise(0, 30), "two": noise(1, 30)}
    store = make_store(clips, tokens, failed=[("two", clips[5].clip_id)])
    report = probe(store, labels, probes=["linear"], draws=DRAWS)
    assert report.left_out == {"labelled clips without tokens of every encoder probed": 1}
    assert len(report.clips) == 29
    assert probe(store, labels, probes=["linear"], encoders=["one"], draws=DRAWS).left_out == {}


@pytest.mark.parametrize(
    ("rows", "heading", "message"),
    [
        ([("set/v000.mp4", "run"), ("set/v001.mp4", "run")], ("clip_id", "label"), "one class, 'run'"),
        ([("set/v000.mp4", "run"), ("set/v000.mp4", "sit")], ("clip_id", "label"), "two labels, 'run' and 'sit'"),
        ([("elsewhere.mp4", "run")], ("clip_id", "label"), "'elsewhere.mp4'; the store's are like 'set/v000.mp4'"),
        ([("set/v000.mp4", "1")], ("clip_id", "answer_index"), "an index into that question's own options"),
        ([("set/v000.mp4", "1")], ("video", "label"), "no column clip_id"),
        ([("set/v000.mp4", "1", "2")], ("clip_id", "label"), "row 1 has another number of cells"),
    ],
)
def test_tables_that_are_none_are_refused(labelled, tmp_path, rows, heading, message):
    result = call(labelled[0], "--labels", write_labels(tmp_path / "l.csv", rows, heading))
    assert result.exit_code == 1
    assert message in result.stderr


def test_the_stores_samples_give_classes_but_answers_are_none(make_store):
    clips = clips_of(24)
    turns = (Turn(role="human", text="?"), Turn(role="gpt", text="a"))

    def sample(index, clip, category):
        name = {"sample_id": f"s{index}", "clip_id": clip.clip_id, "category": category}
        return Sample(**name, turns=turns, stage="eval", source="toy", options=("a", "b"), answer_index=index % 2)

    kinds = [KINDS[index % 2] for index in range(24)]
    samples = [sample(index, clip, kinds[index]) for index, clip in enumerate(clips)]
    samples += [sample(98, clips[0], "sit"), sample(99, clips[1], kinds[1])]
    store = make_store(clips, {"reads": with_label(noise(0, 24), kinds)}, samples=samples)
    report = probe(store, category="category", probes=["linear"], draws=DRAWS)
    assert report.left_out == {"clips whose samples differ in category": 1}
    assert report.classes == {"jump": 11, "run": 12}
    assert report.rows[0].accuracy == 1.0
    assert call(store, "--category", "--probes", "linear").exit_code == 3  # the column of that name
    same = [sample(index, clip, "run") for index, clip in enumerate(clips)]
    same += [sample(99, clips[0], "sit"), sample(98, clips[1], "sit")]
    one = make_store(clips, {"reads": noise(0, 24)}, name="one.zarr", samples=same)
    assert "left out: 2 clips whose samples differ in category" in call(one, "--category").stderr
    for words in (["--category", "answer_index"], ["--category", "options"]):
        result = call(store, *words)
        assert result.exit_code == 1
        assert "an index into that question's own options, not a class" in result.stderr
    assert "give labels of clips" in call(store).stderr


def test_grids_of_one_encoder_are_named_by_them_and_found_by_their_id(make_store):
    clips, labels = clips_of(24), [KINDS[index % 2] for index in range(24)]
    fine = with_label(noise(0, 24), labels)
    store = make_store(clips, {("toy", "last"): fine, ("toy", "same"): fine[:, :, :1, :1]})
    coarse = FeatureStore.open(store).encoders["toy@2x1x1"].id
    by_clip = dict(zip((clip.clip_id for clip in clips), labels, strict=True))
    report = probe(store, by_clip, subsets=[f"toy@{coarse[:6]}", "toy@2x1x1+toy@2x2x2"], probes=["linear"], draws=DRAWS)
    assert {row.encoders for row in report.rows} == {("toy@2x1x1",), ("toy@2x1x1", "toy@2x2x2")}
    (row,) = probe(store, by_clip, encoders=[f"toy@{coarse}"], probes=["linear"], draws=DRAWS).rows
    assert row.encoders == ("toy@2x1x1",)


def test_layers_of_one_encoder_are_ranked_and_named(make_store):
    clips = clips_of(30)
    labels = {clip.clip_id: KINDS[index % 3] for index, clip in enumerate(clips)}
    tokens = {
        ("toy", "block 2"): noise(0, 30),
        ("toy", "block 9"): with_label(noise(1, 30), labels.values()),
        "other": noise(2, 30),
    }
    store = make_store(clips, tokens)
    keys = {identity.layer: key for key, identity in FeatureStore.open(store).encoders.items() if "toy" in key}
    report = probe(store, labels, probes=["linear"], draws=DRAWS)
    best = next(row for row in report.rows if len(row.encoders) == 1)
    assert best.encoders == (keys["block 9"],)
    assert report.identities == {key: f"layer: {layer}" for layer, key in keys.items()}
    assert len(report.rows) == 5  # three alone, and `other` with each layer: no set holds both layers
    both = "+".join(sorted(keys.values()))
    named = probe(store, labels, probes=["linear"], encoders=["toy"], subsets=[both], draws=DRAWS)
    assert [set(row.encoders) for row in named.rows] == [set(keys.values())]


def test_grids_are_those_that_the_store_holds_exactly(make_store):
    """The class is where in the frame something is: 2 x 2 places tell, their mean does not."""
    clips = clips_of(40)
    tokens = noise(0, 40, (2, 4, 4), 3) * 0.2
    labels = {}
    for index, clip in enumerate(clips):
        labels[clip.clip_id] = KINDS[index % 2]
        tokens[index, :, 0, 0 if index % 2 else 3] += 3
    architecture = {"tubelet_frames": 1, "image_size": 14, "patch_size": 1}
    fields = {"odd": {"architecture": architecture, "num_frames": 2}}
    store = make_store(clips, {"even": tokens, "odd": tokens}, **fields)
    report = probe(store, labels, subsets=["alone"], probes=["linear"], grids=[1, 4], draws=DRAWS)
    found = {(row.encoders[0], row.tokens_per_frame): row.accuracy for row in report.rows}
    assert set(found) == {("even", 1), ("even", 4)}
    assert found["even", 4] > 0.95
    assert found["even", 1] < 0.75
    assert set(report.not_computed) == {
        f"linear probes of odd at {text}, mean over time" for text in ("1 token per frame", "4 tokens per frame")
    }
    assert "no exact average of the stored 4 x 4, an average of the encoder's 14 x 14" in str(report.not_computed)
    levels = probe(store, labels, encoders=["even"], probes=["attentive"], grids="all", draws=DRAWS).rows
    assert {row.tokens_per_frame for row in levels} == {1, 4, 16}
    own = probe(store, labels, encoders=["odd"], probes=["linear"], draws=DRAWS)
    assert any("odd" in note and "overlap" in note for note in own.notes)
    with pytest.raises(UserError, match="squares"):
        probe(store, labels, grids=[3])


def test_what_does_not_fit_in_memory_is_refused_with_its_size(labelled):
    """60 clips x (8 tokens x (6 + 4) channels x 2 bytes + 10 means x 4 bytes) are 12 kB."""
    store, labels = labelled
    with pytest.raises(UserError, match=r"features of 60 clips take 12\.0 kB.*over the 20\.0 kB of --max-memory"):
        probe(store, labels, max_memory=20_000)


def test_the_ranking_is_compared_with_retrained_runs(labelled, new_sweep):
    """Seeds 0 and 1 rank blind < reads < both; seed 2 the other way round."""
    store, labels = labelled
    folder = new_sweep(("blind", "reads"))
    order = {("blind",): 2, ("reads",): 8, ("blind", "reads"): 14}
    for seed in range(3):
        for subset, right in order.items():
            num_right = right if seed < 2 else 16 - right
            folder.add(entry(subset, seed), [make_answer(i, right=i < num_right, per_video=1) for i in range(40)])
    report = probe(store, labels, probes=["linear"], sweep=folder.path, draws=DRAWS)
    (found,) = report.agreement
    assert (found.seeds, len(found.subsets)) == ((0, 1, 2), 3)
    scores = [accuracies(report)[name] for name in ("blind", "reads", "blind+reads")]
    ranks = [sum(other < score for other in scores) + sum(other == score for other in scores) / 2 for score in scores]
    rho = np.corrcoef(ranks, [1, 2, 3])[0, 1]
    assert rho > 0.8
    assert found.spearman.value == pytest.approx(rho)  # means over seeds: 6, 8 and 10 of 40
    assert found.single.value == pytest.approx((rho + rho - rho) / 3)
    assert found.ceiling.value == pytest.approx((1 - 1 - 1) / 3)
    assert found.single.low <= found.single.value <= found.single.high
    words = ["--sweep", folder.path, "--probes", "linear", "--draws", DRAWS, "--format", "markdown"]
    result = call(store, "--labels", write_labels(folder.path / "l.csv", labels.items()), *words)
    assert result.exit_code == 0, result.stderr
    assert f"| {found.single.value:.4f} [" in result.stdout


def test_a_sweep_of_two_sets_is_no_ranking(labelled, new_sweep):
    store, labels = labelled
    folder = new_sweep(("blind", "reads"))
    for subset in (("blind",), ("reads",)):
        folder.add(entry(subset), [make_answer(index, right=index < 10) for index in range(20)])
    (found,) = probe(store, labels, probes=["linear"], sweep=folder.path, draws=DRAWS).agreement
    assert isinstance(found.spearman, NotComputed)
    assert "2 sets of encoders are probed and retrained, 3 are needed" in found.spearman.reason
    assert found.without == ("blind+reads",)


def test_the_command_writes_every_format(labelled, tmp_path):
    store, labels = labelled
    table = write_labels(tmp_path / "l.csv", labels.items())

    def written(*words):
        result = call(store, "--labels", table, "--probes", "linear", "--subsets", "reads", "--draws", 100, *words)
        assert result.exit_code == 0, result.stderr
        return result

    printed = written().stdout
    assert all(words in printed for words in ("reads", "Chance: 33.3%", "Memory: at most", "mean cross-entropy"))
    rows = list(csv.DictReader(io.StringIO(written("--format", "csv").stdout)))
    (accuracy,) = (row for row in rows if row["column"] == "accuracy")
    assert accuracy["row"].startswith("encoders=reads;")
    report = json.loads(written("--json").stdout)
    for name, column in (("accuracy", "value"), ("low", "low"), ("high", "high")):
        assert float(accuracy[column]) == pytest.approx(report["rows"][0][name])
    assert len(report["rows"][0]["predicted"]) == len(report["clips"]) == 60
    for name, start in (("t.md", "# Probes"), ("t.tex", "% Probes"), ("t.csv", "block,"), ("t.json", "{")):
        assert written("--out", tmp_path / name).stdout == ""
        assert (tmp_path / name).read_text().startswith(start)
    assert call(store, "--labels", table, "--out", tmp_path / "t.xyz").exit_code == 1
