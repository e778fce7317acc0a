"""Live tokens compared with tokens of a store: the same bits, the same losses; and what only live tokens can do."""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from featurestore import FeatureStore
from featurestore.clips import Clip, Turn
from mervcache.errors import UserError
from pipeline.config import read_config as read_extract_config
from pipeline.extract import extract
from trainer.config import FUSIONS, PROJECTORS, FusionConfig, OptimizerConfig, ProjectorConfig, TrainConfig
from trainer.data.tokens import PrefixedTokens
from trainer.end_to_end import live_source
from trainer.loop.plan import make_plan
from trainer.loop.train import train
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs.load import load_run
from trainer.runs.run_record import RunRecord, read_metrics
from trainer.sources import open_store
from trainer.storage_cast import through_storage

pytestmark = pytest.mark.slow

ENCODERS = ["dinov2", "languagebind", "siglip", "vivit"]  # in the order of a store


@pytest.fixture(autouse=True)
def longer_mini_llm(monkeypatch):
    """`fresh:mini` with room for the visual tokens of four encoders in a row."""
    monkeypatch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=32, num_layers=1, num_heads=2, context=256))


def toy_config(**changes):
    settings = {
        "llm": "fresh:mini",
        "train_llm": "full",
        "optimizer": OptimizerConfig(projector_lr=3e-3, fusion_lr=3e-3, llm_lr=3e-3, encoder_lr=3e-3, warmup_ratio=0.0),
        "batch_size": 6,
        "micro_batch_size": 4,
        "max_steps": 3,
        "precision": "fp32",
        "checkpoint_every": 100,
    }
    return TrainConfig(**{**settings, **changes})


@pytest.fixture
def opened_live(media_lab, media_root):
    @contextmanager
    def opened(config=None, *, out=None, is_trusted=False, root=None, **changes):
        settings = media_lab.settings(root or media_root, **changes)
        with live_source(config or toy_config(), settings, out=out, is_trusted=is_trusted) as found:
            yield found

    return opened


@pytest.fixture(scope="module")
def live(media_lab, media_root):
    """Samples and a live source of all four encoders, looked at once for all tests of this file."""
    torch.set_num_threads(1)
    with live_source(toy_config(), media_lab.settings(media_root)) as found:
        yield found


@pytest.fixture
def cached(extracted):
    return open_store(str(extracted), toy_config())


def losses(run):
    return [row["loss"] for row in read_metrics(run)]


def train_quietly(config, samples, source, out, **options):
    train(config, samples, source, out, quiet=True, **options)
    return losses(out)


def test_live_tokens_have_the_bits_of_stored_ones_whatever_else_is_in_the_batch(live, extracted):
    _, source = live
    store = FeatureStore.open(extracted)
    clip_ids = sorted(source.available(store.clips["clip_id"].to_pylist()))
    assert list(source.shapes) == ["languagebind", "dinov2", "vivit", "siglip"]
    assert set(source.shapes) == set(store.encoders)
    assert {name: shape.identity for name, shape in source.shapes.items()} == {
        name: identity.id for name, identity in store.encoders.items()
    }
    for requested in (clip_ids, clip_ids[::-1], clip_ids[3:6], clip_ids[-1:]):
        source.expect(requested)
        for encoder, tokens in source.fetch(requested).items():
            assert tokens.dtype == torch.float16
            np.testing.assert_array_equal(tokens.numpy(), store.read(requested, encoder=encoder), err_msg=encoder)


@pytest.mark.parametrize(
    ("fusion", "projector"),
    [
        *((fusion, "2d-average") for fusion in FUSIONS),
        ("cross_attention", "3d-average"),
        ("concat_channel", "3d-average"),
    ],
)
def test_every_loss_equals_the_one_from_the_cache_to_the_bit(tmp_path, live, cached, fusion, projector):
    preset = PROJECTORS[projector]
    config = toy_config(
        fusion=FusionConfig(name=fusion, query_width=64),
        projector=ProjectorConfig(resampler=preset.resampler, frame_divisor=preset.frame_divisor),
    )
    from_cache = train_quietly(config, *cached, tmp_path / "cache", store="s")
    end_to_end = train_quietly(config, *live, tmp_path / "live")
    assert len(end_to_end) == 3
    assert len(set(end_to_end)) == 3
    assert end_to_end == from_cache  # the stated tolerance: none


def test_visual_tokens_take_the_place_of_the_placeholder_live_and_from_the_cache(tmp_path, live, cached):
    def placed(samples):
        return [
            replace(s, turns=(Turn(role="human", text="What colour is <video> it?"), *s.turns[1:])) for s in samples
        ]

    config = toy_config(visual_position="placeholder")
    found = [
        train_quietly(config, placed(samples), source, tmp_path / name)
        for name, (samples, source) in {"live": live, "cached": cached}.items()
    ]
    assert found[0] == found[1] != train_quietly(toy_config(), placed(cached[0]), cached[1], tmp_path / "after_bos")


def test_validation_in_bf16_sees_the_tokens_of_float32_encoders_as_training_does(tmp_path, live, cached):
    config = toy_config(precision="bf16", encoders=("dinov2", "siglip"), max_steps=2, eval_every=1)
    rows = {}
    for name, (samples, source) in {"cache": cached, "live": live}.items():
        held_out = [replace(sample, sample_id=f"h-{sample.sample_id}", split="heldout") for sample in samples]
        train(config, [*samples, *held_out], source, tmp_path / name, quiet=True)
        rows[name] = [(row["loss"], row["val_loss"]) for row in read_metrics(tmp_path / name)]
    assert rows["live"] == rows["cache"]


def test_class_tokens_and_a_standardised_grid_are_the_same_live(tmp_path, opened_live, extracted):
    for name, projector in {
        "class": ProjectorConfig(resampler="class_token"),
        "grid": ProjectorConfig(grid=(2, 2, 2), standardise=True, head="gelu-mlp", pre_layer_norm=True),
    }.items():
        config = toy_config(encoders=("vivit", "dinov2"), projector=projector, max_steps=2)
        samples, stored = open_store(str(extracted), config)
        from_cache = train_quietly(config, samples, stored, tmp_path / name / "cache")
        with opened_live(config) as (live_samples, source):
            assert list(source.shapes) == ["vivit", "dinov2"]
            fetched = source.fetch([live_samples[0].clip_id])["vivit"]
            assert isinstance(fetched, PrefixedTokens) == (name == "class")
            assert train_quietly(config, live_samples, source, tmp_path / name / "live") == from_cache


@pytest.mark.parametrize("storage_dtype", ["float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_the_cast_is_the_one_that_a_store_makes(tmp_path, toy_identity, write_store, storage_dtype, kind):
    identity = toy_identity(still_period=2, width=3, prefix_tokens=1, storage_dtype=storage_dtype)
    random = np.random.default_rng(5)
    grid = identity.grid_of(kind)
    arrays = {
        "tokens": random.standard_normal((*grid, 3)).astype(np.float32),
        "prefix": random.standard_normal((grid[0], 1, 3)).astype(np.float32),
    }
    clip = Clip(dataset="set", path="a", kind=kind)
    write_store(tmp_path / "toy.zarr", [clip], {"toy": identity}, {("toy", clip.clip_id): arrays}).publish_snapshot()
    store = FeatureStore.open(tmp_path / "toy.zarr")
    cast = through_storage(arrays, identity)
    for part, read in {"tokens": store.read, "prefix": store.read_prefix}.items():
        expected = read([clip.clip_id], encoder="toy")[0]
        assert cast[part].dtype == expected.dtype
        np.testing.assert_array_equal(cast[part], expected)


def test_tokens_that_overflow_the_storage_dtype_end_the_run_with_advice(toy_identity):
    identity = toy_identity(num_frames=1, grid=(1, 1, 1), pooling="none", width=1)
    with pytest.raises(UserError, match=r"toy: tokens overflow float16.*storage_dtype: bfloat16"):
        through_storage({"tokens": np.full((1, 1, 1, 1), 1e6, np.float32)}, identity)


def test_a_broken_clip_is_dropped_before_the_first_step_as_from_a_cache(tmp_path, opened_live, cached, media_lab):
    config = toy_config()
    out = tmp_path / "run"
    with opened_live(out=out) as (samples, source):
        plan = make_plan(config, samples, source)
        assert plan.data.dropped == make_plan(config, *cached).data.dropped
        assert sum(plan.data.dropped.values()) == 1
        assert plan.batches.order.batch(0) == make_plan(config, *cached).batches.order.batch(0)
    (kept,) = out.glob("media-*.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines() if line]
    assert len(lines) == 8
    (broken,) = [line for line in lines if "reason" in line]
    assert broken["clip_id"] == f"videollava/{media_lab.BROKEN}"
    assert broken["reason"]


def test_a_resumed_run_looks_at_nothing_twice_and_has_the_losses_of_a_whole_one(tmp_path, opened_live):
    config = toy_config(max_steps=4, encoders=("siglip",))
    with opened_live(config, out=tmp_path / "whole") as (samples, source):
        whole = train_quietly(config, samples, source, tmp_path / "whole")
    with opened_live(config, out=tmp_path / "cut") as (samples, source):
        train_quietly(config, samples, source, tmp_path / "cut", stop_at=2)
    with opened_live(config, out=tmp_path / "cut") as (samples, source):
        (kept,) = (tmp_path / "cut").glob("media-*.jsonl")
        before = kept.read_text()
        source.available(sample.clip_id for sample in samples)
        assert kept.read_text() == before  # a line is added for every clip that is decoded
        assert train_quietly(config, samples, source, tmp_path / "cut", resume=True) == whole


def test_trusted_media_are_not_looked_at_and_a_broken_clip_ends_the_run(tmp_path, opened_live):
    with (
        opened_live(out=tmp_path / "run", is_trusted=True) as (samples, source),
        pytest.raises(UserError, match=r"films/broken\.mp4 cannot be decoded: .*without --skip-media-check"),
    ):
        train_quietly(toy_config(max_steps=2), samples, source, tmp_path / "run")
    assert not list((tmp_path / "run").glob("media-*"))


def test_media_that_change_behind_a_run_are_noticed(tmp_path, opened_live, media_lab):
    root = media_lab.make_media(tmp_path / "media")
    with opened_live(root=root, encoders=["siglip"]) as (_, source):
        clip_id = "videollava/pictures/red.png"
        assert source.available([clip_id]) == {clip_id}
        (root / "pictures/red.png").write_bytes((root / "pictures/blue.png").read_bytes())
        with pytest.raises(UserError, match=r"the media of videollava/pictures/red\.png have changed"):
            source.fetch([clip_id])


def test_the_record_names_where_tokens_came_from(tmp_path, live, cached):
    config = toy_config(max_steps=1)
    train_quietly(config, *cached, tmp_path / "cache", store="features/s.zarr")
    train_quietly(config, *live, tmp_path / "live")
    from_cache, end_to_end = RunRecord.read(tmp_path / "cache"), RunRecord.read(tmp_path / "live")
    assert (from_cache.tokens, from_cache.live, from_cache.store) == ("from cache", None, "features/s.zarr")
    assert (end_to_end.tokens, end_to_end.store) == ("end to end", "")
    assert (end_to_end.live["dataset"], end_to_end.live["batch"]) == ("videollava", {"video": 2, "image": 3})
    assert end_to_end.encoders["dinov2"]["weights_from"] == "random:0"
    assert end_to_end.encoders["dinov2"]["identity"] == from_cache.encoders["dinov2"]["identity"]


def test_an_encoder_that_is_trained_learns_and_the_others_keep_their_bytes(tmp_path, opened_live):
    """A frozen LLM, projectors and fusion with rate 0: whatever the loss gains comes from the encoder.

    How much it can gain is little, through layers that stay random; with rate 0 for the encoder too it gains nothing.
    """
    rates = OptimizerConfig(projector_lr=0.0, fusion_lr=0.0, encoder_lr=1e-2, warmup_ratio=0.0)
    config = toy_config(
        encoders=("dinov2", "siglip"),
        train_encoders=("siglip",),
        train_llm="none",
        allow_fresh_frozen=True,
        optimizer=rates,
        batch_size=7,  # all samples in every step: losses can be compared
        micro_batch_size=7,
        max_steps=12,
    )
    out = tmp_path / "run"
    with opened_live(config) as (samples, source):
        before = {name: weight.clone() for name, weight in source.trained["siglip"].state_dict().items()}
        clip_ids = [sample.clip_id for sample in samples if "broken" not in sample.clip_id]
        fetched = source.fetch(clip_ids)
        assert (fetched["siglip"].dtype, tuple(fetched["siglip"].shape[1:])) == (torch.uint8, (16, 32, 32, 3))
        still = replace(config, optimizer=replace(rates, encoder_lr=0.0))
        assert np.ptp(train_quietly(still, samples, source, tmp_path / "still")) < 1e-5
        assert all(torch.equal(before[name], w) for name, w in source.trained["siglip"].state_dict().items())
        found = train_quietly(config, samples, source, out)
        assert torch.equal(source.fetch(clip_ids)["dinov2"], fetched["dinov2"])
        trained = dict(source.trained["siglip"].state_dict())
    assert found[-1] < found[0] - 0.05
    unchanged = [name for name in before if torch.equal(before[name], trained[name])]
    assert unchanged == []

    loaded = load_run(out)  # which has no weights but those of the checkpoint
    assert loaded.built.model.trained_names == ("siglip",)
    state = loaded.built.model.trained_encoders[0].state_dict()
    assert all(torch.equal(state[name], trained[name].cpu()) for name in trained)
    assert loaded.record.parameters["encoders"]["trained"] == sum(weight.numel() for weight in trained.values())
    assert loaded.record.shapes["siglip"].identity.endswith("+trained")


def test_a_trained_encoder_starts_with_the_tokens_of_the_frozen_one(opened_live, extracted):
    """To the rounding of the storage cast, which trained tokens do not go through; stills as clips of equal frames."""
    store = FeatureStore.open(extracted)
    config = toy_config(train_encoders=tuple(ENCODERS))
    with opened_live(config) as (samples, source):
        clip_ids = sorted(source.available(sample.clip_id for sample in samples))
        assert len(clip_ids) == 7
        frames = source.fetch(clip_ids)
        for name, encoder in source.trained.items():
            with torch.no_grad():
                tokens_BTHWD = encoder(frames[name]).numpy()
            stored_BTHWD = store.read(clip_ids, encoder=name).astype(np.float32)
            np.testing.assert_allclose(tokens_BTHWD, stored_BTHWD, rtol=2**-11, atol=1e-5, err_msg=name)


def test_other_frames_are_the_same_live_as_from_a_store(tmp_path, opened_live, media_lab, media_root):
    """Frame rules of released models, LanguageBind's unrounded frames, ViViT's 8 steps: frozen and trained."""
    rules = dict.fromkeys(("languagebind", "dinov2"), "linspace-16") | {"siglip": "+times"}
    rules["vivit"] = "linspace-32/1+steps/2"
    changes = {"frame_rule": rules, "frame_dtype": {"languagebind": "float32"}, "exif": "apply"}
    path = tmp_path / "other.zarr"
    extract(read_extract_config(None, media_lab.settings(media_root, store=str(path), **changes)), quiet=True)
    store = FeatureStore.open(path)
    with opened_live(**changes) as (_, source):
        clip_ids = sorted(source.available(store.clips["clip_id"].to_pylist()))
        assert {name: shape.identity for name, shape in source.shapes.items()} == {
            name: identity.id for name, identity in store.encoders.items()
        }
        for name, tokens in source.fetch(clip_ids).items():
            np.testing.assert_array_equal(tokens.numpy(), store.read(clip_ids, encoder=name), err_msg=name)
    with opened_live(toy_config(train_encoders=tuple(ENCODERS)), **changes) as (_, source):
        frames = source.fetch(clip_ids)
        for name, encoder in source.trained.items():
            with torch.no_grad():
                tokens_BTHWD = encoder(frames[name]).numpy()
            stored_BTHWD = store.read(clip_ids, encoder=name).astype(np.float32)
            np.testing.assert_allclose(tokens_BTHWD, stored_BTHWD, rtol=2**-11, atol=1e-5, err_msg=name)


def test_every_weight_of_a_trained_encoder_gets_a_gradient(opened_live):
    """Where ranks add up gradients, one that never comes is waited for."""
    with opened_live(toy_config(train_encoders=tuple(ENCODERS))) as (samples, source):
        frames = source.fetch([samples[0].clip_id])
        for name, encoder in source.trained.items():
            tokens_BTHWD = encoder(frames[name])
            (
                tokens_BTHWD * torch.randn(tokens_BTHWD.shape, generator=torch.Generator().manual_seed(0))
            ).sum().backward()
            assert [n for n, weight in encoder.named_parameters() if weight.grad is None] == [], name


def test_encoders_cannot_be_trained_from_a_cache(tmp_path, cached):
    config = toy_config(train_encoders=("siglip",))
    with pytest.raises(UserError, match="siglip, but a store holds tokens, not frames: train with --end-to-end"):
        train_quietly(config, *cached, tmp_path / "run")


def test_a_trained_encoder_must_be_one_of_the_run(opened_live):
    config = toy_config(train_encoders=("vivit",), fusion=FusionConfig(name="first"))
    with pytest.raises(UserError, match="unknown encoder in train_encoders 'vivit'"), opened_live(config):
        pass
