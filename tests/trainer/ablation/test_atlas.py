"""An atlas against the model itself and hand arithmetic; and a store whose contributions follow motion by design."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from featurestore import Clip, FeatureStore
from mervcache.errors import UserError
from tests.pipeline.test_properties import FRAMES, film
from trainer.ablation.atlas import atlas_table, measure_atlas, read_metadata, write_atlas
from trainer.ablation.atlas_findings import changes, correlations, most_activating, spreads
from trainer.ablation.atlas_run import AtlasRequest, make_atlas
from trainer.config import FUSIONS, FusionConfig, ProjectorConfig
from trainer.loop.train import train
from trainer.main import eval_main
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs.export import export_run
from trainer.runs.load import load_run
from trainer.sources import open_store

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def longer_mini_llm(monkeypatch):
    """`fresh:mini` with room for the visual tokens of four encoders in a row."""
    monkeypatch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=32, num_layers=1, num_heads=2, context=256))


@pytest.fixture
def train_run(tmp_path, config):
    """Trains a run on a store; changes are settings."""

    def run(store, name="run", **changes):
        changed = replace(config, **{"max_steps": 1, **changes})
        samples, source = open_store(str(store), changed)
        train(changed, samples, source, tmp_path / name, store=str(store), quiet=True)
        return tmp_path / name

    return run


def visual_tokens(run, store):
    """Clip ids, embeddings by encoder and weights_CE of the whole model with its LLM."""
    model, opened = load_run(run).built.model, FeatureStore.open(store)
    clip_ids = opened.clips["clip_id"].to_pylist()
    tokens = {encoder: torch.from_numpy(opened.read(clip_ids, encoder=encoder)) for encoder in model.encoders}
    with torch.no_grad():
        projected = {e: p(tokens[e]).numpy() for e, p in zip(model.encoders, model.projectors, strict=True)}
        _, weights_CE = model.visual_tokens(tokens)
    return clip_ids, projected, weights_CE


@pytest.mark.parametrize("name", FUSIONS)
def test_weights_are_those_of_the_model_and_norms_those_of_what_is_weighted(train_run, question_store, name):
    run = train_run(question_store, fusion=FusionConfig(name=name, query_width=12))
    atlas = measure_atlas(run, quiet=True)
    clip_ids, projected, weights_CE = visual_tokens(run, question_store)
    assert atlas.clip_ids == tuple(clip_ids)
    assert atlas.encoders == tuple(projected)
    assert (atlas.weight_CE is None) == name.startswith("concat")
    if weights_CE is not None:
        np.testing.assert_allclose(atlas.weight_CE, weights_CE.numpy(), rtol=1e-5)
    if name.startswith("concat_channel"):
        return  # what a contribution is there: tests/trainer/model/test_fusion.py
    for place, embeddings_CNM in enumerate(projected.values()):
        length_C = np.sqrt((embeddings_CNM.astype(np.float64) ** 2).sum(-1)).mean(1)
        weight_C = 1.0 if weights_CE is None else weights_CE[:, place].numpy()
        np.testing.assert_allclose(atlas.norm_CE[:, place], weight_C * length_C, rtol=1e-4)


def test_clips_without_tokens_of_an_encoder_are_counted(train_run, make_question_store, tmp_path):
    failed = [("vivit", "set/clip3.mp4")]
    store = make_question_store(tmp_path / "part.zarr", failed=failed)
    atlas = measure_atlas(train_run(store), quiet=True)
    assert (len(atlas.clip_ids), atlas.available, atlas.without) == (20, 20, 1)
    assert "set/clip3.mp4" not in atlas.clip_ids


def test_the_table_holds_every_clip_and_says_of_what(train_run, question_store, tmp_path):
    run = train_run(question_store)
    atlas = measure_atlas(run, quiet=True)
    path = write_atlas(atlas, atlas_table(atlas, {"motion": {atlas.clip_ids[2]: 1.5}}, {"decoded": 1}))
    assert path.parent == run / "atlas"
    table = pq.read_table(path)
    values = ["weight_dinov2", "weight_vivit", "norm_dinov2", "norm_vivit", "motion"]
    assert table.column_names == ["clip_id", "dataset", "kind", *values]
    np.testing.assert_array_equal(table["norm_vivit"].to_numpy(), atlas.norm_CE[:, 1])
    assert table["motion"].to_pylist() == [None, None, 1.5, *[None] * 18]
    assert set(table["dataset"].to_pylist()) == {"set"}
    record, identities = read_metadata(table), FeatureStore.open(question_store).encoders
    assert record["step"] == 1
    assert record["snapshot"] == FeatureStore.open(question_store).snapshot
    assert record["identities"] == {encoder: identities[encoder].id for encoder in ("dinov2", "vivit")}
    assert record["weights"] == {"dinov2": "random:0", "vivit": "random:0"}
    before = path.read_bytes()
    assert write_atlas(atlas, atlas_table(atlas, {"motion": {atlas.clip_ids[2]: 1.5}}, {"decoded": 1})) == path
    assert path.read_bytes() == before


def test_a_sample_follows_from_its_seed_and_has_a_file_of_its_own(train_run, question_store):
    run = train_run(question_store)
    whole = measure_atlas(run, quiet=True)
    some, same, other = (measure_atlas(run, clips=6, seed=seed, quiet=True) for seed in (0, 0, 1))
    assert some.clip_ids == same.clip_ids != other.clip_ids
    assert len({whole.name, some.name, other.name}) == 3
    places = [whole.clip_ids.index(clip) for clip in some.clip_ids]
    np.testing.assert_allclose(some.norm_CE, whole.norm_CE[places], rtol=1e-6)


def test_a_checkpoint_is_chosen_by_its_step(train_run, question_store):
    run = train_run(question_store, max_steps=4)  # a checkpoint every 2 steps
    newest, earlier = measure_atlas(run, quiet=True), measure_atlas(run, step=2, quiet=True)
    assert (newest.step, earlier.step) == (4, 2)
    assert not np.array_equal(newest.norm_CE, earlier.norm_CE)
    with pytest.raises(UserError, match="it has 2, 4"):
        measure_atlas(run, step=3, quiet=True)
    with pytest.raises(UserError, match="validated"):
        measure_atlas(run, best=True, quiet=True)


def test_an_export_has_the_atlas_of_its_run(train_run, question_store, tmp_path):
    run = train_run(question_store)
    export_run(run, tmp_path / "export")
    exported = measure_atlas(tmp_path / "export", str(question_store), quiet=True)
    np.testing.assert_array_equal(exported.norm_CE, measure_atlas(run, quiet=True).norm_CE)


def test_text_only_runs_have_none(train_run, question_store):
    run = train_run(question_store, mode="text-only")
    with pytest.raises(UserError, match="text-only"):
        measure_atlas(run, quiet=True)


def hand_made(atlas, norm_CE, media=None):
    """The atlas with these norms, and equal weights."""
    num = len(norm_CE)
    return replace(
        atlas,
        clip_ids=tuple(f"d/{row}" for row in range(num)),
        datasets=("a",) * (num // 2) + ("b",) * (num - num // 2),
        kinds=("video",) * num,
        media=tuple(media or (f"d/{row}" for row in range(num))),
        weight_CE=np.full((num, 2), 0.5),
        norm_CE=np.asarray(norm_CE, np.float64),
    )


def test_activation_and_spread_by_hand(train_run, question_store):
    atlas = hand_made(
        measure_atlas(train_run(question_store), quiet=True),
        [[3, 1], [1, 1], [1, 3], [1, 4]],  # shares of the first: .75, .5, .25, .2; mean .425
        media=["d/0", "d/1", "d/2", "d/2"],
    )
    assert not atlas.has_clip_weights
    first, second = (most_activating(atlas, encoder, 3) for encoder in atlas.encoders)
    assert [each.row for each in first] == [0, 1, 2]  # row 3 is of the file of row 2
    assert [each.ratio for each in first] == pytest.approx([0.75 / 0.425, 0.5 / 0.425, 0.25 / 0.425])
    assert [each.row for each in second] == [3, 1, 0]
    found = {(each.dataset, each.encoder): each for each in spreads(atlas, "norm")}
    assert found["a", "dinov2"].median == pytest.approx(2 / 1.5)  # of 3 and 1, mean of all 1.5
    assert found["b", "vivit"].low == pytest.approx(3.1 / 2.25)  # percentile 10 of 3 and 4


def test_change_by_hand(train_run, question_store):
    atlas = measure_atlas(train_run(question_store), quiet=True)
    before = hand_made(atlas, [[1, 1], [1, 3], [3, 1], [1, 1]])
    after = replace(before, norm_CE=np.array([[3.0, 1], [1, 3], [3, 1], [1, 1]]))
    share = {each.encoder: each for each in changes(before, after, draws=100) if each.measure == "share"}
    assert share["dinov2"].before == pytest.approx((0.5 + 0.25 + 0.75 + 0.5) / 4)
    assert share["dinov2"].after == pytest.approx((0.75 + 0.25 + 0.75 + 0.5) / 4)
    assert share["dinov2"].mean_abs == pytest.approx(0.25 / 4)
    assert share["dinov2"].order.low is None  # four files are too few for an interval
    with pytest.raises(UserError, match="none of the encoders"):
        changes(replace(before, encoders=("a", "b")), after, draws=100)


def test_properties_that_are_constant_or_of_few_files_have_a_reason(train_run, question_store):
    atlas = hand_made(measure_atlas(train_run(question_store), quiet=True), [[c + 1, 9 - c] for c in range(8)])
    length = dict.fromkeys(atlas.clip_ids, 2.0)
    motion = {clip: float(place) for place, clip in enumerate(atlas.clip_ids)}
    found = correlations(atlas, {"length_s": length, "motion": motion}, draws=100)
    constant = [each for each in found if each.other == "length_s"]
    assert all(each.rho is None and "the same for every clip" in each.reason for each in constant)
    moving = {(each.encoder, each.measure): each for each in found if each.other == "motion"}
    assert moving["dinov2", "norm"].rho == pytest.approx(1)
    assert moving["vivit", "share"].rho == pytest.approx(-1)
    assert all(each.low is None and "8 media files" in each.reason for each in moving.values())


MOVING = 24  # films


@pytest.fixture(scope="module")
def moving_store(tmp_path_factory, write_store, toy_identity):
    """Films of a bar that moves at different speeds; tokens of vivit are as large as the bar is fast, dinov2's random.

    One name is HTML, one film is cut off in the middle of its bytes.
    """
    folder, random = tmp_path_factory.mktemp("moving"), np.random.default_rng(5)
    clips, arrays = [], {}
    identities = {name: toy_identity(name, grid=(4, 2, 2), width=8) for name in ("dinov2", "vivit")}
    for index in random.permutation(MOVING):
        name = f"film{index}.mp4" if index else "<img src=x onerror=alert(1)>\u202e.mp4"
        frames = np.full((FRAMES, 64, 64, 3), 40, np.uint8)
        for number, frame in enumerate(frames):
            start = number * int(index) // 8 % 48
            frame[:, start : start + 16] = 200
        film(folder / "media" / name, frames)
        clips.append(Clip(dataset="d", path=name, kind="video"))
        tokens = random.standard_normal((2, 4, 2, 2, 8)).astype(np.float16)
        tokens[1] *= 1 + index
        arrays |= {(e, clips[-1].clip_id): {"tokens": t} for e, t in zip(identities, tokens, strict=True)}
    broken = folder / "media/film7.mp4"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    write_store(folder / "moving.zarr", clips, identities, arrays).publish_snapshot()
    return folder


@pytest.fixture
def moving_run(moving_store, train_run, tmp_path, make_sample):
    """A run on the tokens of the films; no standardisation, which would be measured on these few."""
    from featurestore import StoreWriter

    store = tmp_path / "moving.zarr"
    shutil.copytree(moving_store / "moving.zarr", store)
    writer = StoreWriter.open_or_create(store)
    ids = FeatureStore.open(store).clips["clip_id"].to_pylist()
    writer.add_samples("toy-finetune", [make_sample(n, clip_id=clip) for n, clip in enumerate(ids)])
    writer.publish_snapshot()

    def run(**changes):
        return train_run(store, projector=ProjectorConfig(grid=(2, 2, 2)), **changes)

    return run


def test_an_encoder_that_follows_motion_is_found(moving_run, moving_store, tmp_path):
    request = AtlasRequest(root=str(moving_store / "media"), draws=400)
    made = make_atlas(moving_run(fusion=FusionConfig(name="equal_mix")), request, quiet=True)
    found = {(each.encoder, each.measure, each.other): each for each in made.result.correlations}
    vivit, dinov2 = (found[encoder, "norm", "motion"] for encoder in ("vivit", "dinov2"))
    assert (vivit.clips, vivit.media) == (MOVING - 1, MOVING - 1)
    assert vivit.rho > 0.9
    assert vivit.is_away
    assert vivit.is_away_after_holm
    assert not dinov2.is_away
    assert found["dinov2", "share", "motion"].rho < -0.9  # what vivit gains, it loses
    fastest = [made.result.atlas.clip_ids[each.row] for each in most_activating(made.result.atlas, "vivit", 4)]
    assert all(int(re.findall(r"\d+", clip_id)[0]) > MOVING / 2 for clip_id in fastest)
    assert list(made.result.properties.failed) == ["d/film7.mp4"]
    page = made.page.read_text()
    assert "vivit with motion of videos" in page
    table = pq.read_table(made.table)
    assert table["motion"].null_count == 1
    assert read_metadata(table)["failed"] == 1


def test_what_an_earlier_atlas_has_measured_is_kept_when_the_media_go(moving_run, moving_store, tmp_path, caplog):
    run, media = moving_run(max_steps=4), tmp_path / "media"
    shutil.copytree(moving_store / "media", media)
    first = make_atlas(run, AtlasRequest(root=str(media), decode=12, draws=100), quiet=True)
    measured = first.result.properties.measured
    assert measured == 12 - len(first.result.properties.failed)
    media.rename(tmp_path / "elsewhere")
    again = make_atlas(run, AtlasRequest(draws=100), quiet=True)  # the same file
    earlier = make_atlas(run, AtlasRequest(step=2, draws=100), quiet=True)  # another one
    assert pq.read_table(again.table)["motion"].null_count == MOVING - measured
    assert first.result.properties.values == again.result.properties.values == earlier.result.properties.values
    assert f"({measured} have them from an earlier atlas of this run)" in again.page.read_text()
    for path in (again.table, earlier.table):
        path.write_bytes(path.read_bytes()[:-50])
    assert make_atlas(run, AtlasRequest(draws=100), quiet=True).result.properties.measured == 0
    assert sum("properties are not read from" in record.message for record in caplog.records) == 2


class Page(HTMLParser):
    """Tags and images of a page; a tag that is left open is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.text = [], set(), [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.images += [dict(attributes)] * (tag == "img")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def call(*words):
    return CliRunner().invoke(eval_main, ["atlas", *map(str, words), "--draws", "100"])


def test_the_command_and_its_page(moving_run, moving_store, tmp_path):
    run = moving_run(max_steps=4)
    result = call(run, "--root", moving_store / "media", "--compare", 2, "--out", tmp_path / "page.html")
    assert result.exit_code == 3  # a film could not be decoded
    assert "1 clip could not be decoded" in result.output
    page = Page((tmp_path / "page.html").read_text())
    assert not page.tags & {"script", "link", "iframe"}
    assert not re.findall(r"https?://|src='(?!data:)|url\((?!data:)", (tmp_path / "page.html").read_text())
    assert [image["alt"] for image in page.images if "onerror" in image] == []
    assert "<img src=x onerror=alert(1)>\\u202e.mp4" in page.text  # spelled out, as text
    assert "Random encoders: dinov2, vivit" in page.text
    assert "run at step 2" in page.text
    assert "frame" in {image["alt"] for image in page.images}
    assert len(list((run / "atlas").glob("*.parquet"))) == 1
    assert not list((run / "atlas").glob("*.html"))


def test_without_media_the_page_shows_maps_of_tokens(moving_run):
    run = moving_run(fusion=FusionConfig(name="concat_sequence"))
    result = call(run, "--json")
    assert result.exit_code == 0
    made = json.loads(result.stdout)
    assert made["correlations"] == []
    assert made["encoders"]["vivit"]["weight"] is None
    page = Page(Path(made["page"]).read_text())
    assert {image["alt"] for image in page.images} == {"tokens of dinov2", "tokens of vivit"}
    for words in (
        "24 clips without media",
        "--root",
        "The fusion concat_sequence has no weights",
        "No clip was decoded",
    ):
        assert words in page.text


def test_runs_with_other_encoders_are_compared_by_those_they_share(moving_run, moving_store, train_run, tmp_path):
    both = moving_run()
    alone = train_run(tmp_path / "moving.zarr", "alone", encoders=("vivit",))
    result = call(both, "--compare", alone, "--decode", 0, "--json")
    assert result.exit_code == 0, result.output
    assert {each["encoder"] for each in json.loads(result.stdout)["changes"]} == {"vivit"}


def test_what_the_command_refuses(moving_run, tmp_path):
    run = moving_run()
    assert "--step and --best" in call(run, "--step", 1, "--best").output
    assert "holds no run" in call(run, "--compare", tmp_path / "nothing").output
    assert "there is no folder" in call(run, "--out", tmp_path / "nowhere/page.html").output
    assert "no checkpoint of step 9" in call(run, "--compare", 9).output
