import hashlib

import numpy as np
import pytest
import torch

from featurestore import FeatureStore
from featurestore.objects.open import open_objects
from featurestore.quality import ParityRecord, ParityRow, keep_record, parity_words
from featurestore.reference_clips import ReferenceClip, ReferenceClips, put_reference_clips
from featurestore.writer import StoreWriter
from mervcache.errors import UserError
from trainer.data.tokens import MemoryTokens, StoreTokens


def test_what_is_fetched_is_what_was_stored_bit_for_bit(store, clips, tokens_of):
    source = StoreTokens(store, ["vivit", "dinov2"])
    ids = [clips[index].clip_id for index in (4, 0, 2, 0)]
    fetched = source.fetch(ids)
    assert list(fetched) == ["vivit", "dinov2"]
    for encoder, tokens_BTHWD in fetched.items():
        expected = torch.from_numpy(np.stack([tokens_of[encoder][clip_id] for clip_id in ids]))
        assert torch.equal(tokens_BTHWD, expected)


def test_a_still_is_repeated_to_the_length_of_a_video(store, clips, tokens_of):
    still = clips[-1].clip_id
    fetched = StoreTokens(store, ["dinov2", "vivit"]).fetch([still])
    assert torch.equal(fetched["dinov2"][0], torch.from_numpy(tokens_of["dinov2"][still]).expand(4, 2, 2, 8))
    assert torch.equal(fetched["vivit"][0], torch.from_numpy(tokens_of["vivit"][still]))


def test_a_clip_is_available_only_with_every_encoder(store, clips):
    ids = [clip.clip_id for clip in clips]
    assert StoreTokens(store, ["dinov2"]).available([*ids, "set/none.mp4"]) == set(ids)
    assert StoreTokens(store, ["dinov2", "vivit"]).available(ids) == set(ids) - {ids[1]}


def test_the_media_of_a_clip_are_those_that_all_its_tokens_were_made_from(store, clips, tmp_path, write_store):
    recorded = {clip.clip_id: hashlib.sha256(clip.path.encode()).hexdigest() for clip in clips}
    assert StoreTokens(store, ["dinov2"]).media_sha256() == recorded
    del recorded[clips[1].clip_id]  # without tokens of vivit
    source = StoreTokens(store, ["dinov2", "vivit"])
    assert source.media_sha256() == recorded
    assert source.listed() == [clip for clip in clips if clip.clip_id in recorded]
    identities = {key: store.encoders[key] for key in ("dinov2", "vivit")}
    arrays = {
        (key, clip.clip_id): {"tokens": np.zeros((*identity.grid_of(clip.kind), identity.width), np.float16)}
        for key, identity in identities.items()
        for clip in clips
    }
    changed = {("vivit", clips[2].clip_id): "e" * 64}  # the file changed between two extractions
    write_store(tmp_path / "other.zarr", clips, identities, arrays, media=changed).publish_snapshot()
    other = FeatureStore.open(tmp_path / "other.zarr")
    assert clips[2].clip_id in StoreTokens(other, ["dinov2"]).media_sha256()
    assert set(StoreTokens(other, ["dinov2", "vivit"]).media_sha256()) == {c.clip_id for c in clips} - {
        clips[2].clip_id
    }


def test_shapes_and_identities_come_from_the_store(store):
    shape = StoreTokens(store, ["vivit"]).shapes["vivit"]
    assert (shape.grid, shape.width, shape.is_pooled) == ((4, 2, 2), 6, True)
    assert shape.identity == store.encoders["vivit"].id


def test_a_run_records_the_newest_parity_check_of_each_encoder_or_that_there_is_none(store):
    digests = dict.fromkeys(("scene", "noise"), "c" * 64)
    identity = store.encoders["dinov2"]
    objects = open_objects(store.path)
    rows = {"tokens": np.zeros((2, *identity.grid, identity.width), np.float16)}
    clips = tuple(
        ReferenceClip(name=name, media_sha256=sha256, frames_sha256=sha256) for name, sha256 in digests.items()
    )
    put_reference_clips(
        objects, ReferenceClips(kind="video", identity=identity, rendering="canaries/1", clips=clips, arrays=rows)
    )
    StoreWriter.open(store.path).publish_snapshot()
    store = FeatureStore.open(store.path)
    row = ParityRow(
        encoder="dinov2",
        identity=identity.id,
        kind="video",
        clips=2,
        frames="equal",
        canaries=store.canaries[f"video/{identity.group_name}"],
        verdict="within",
        max_abs=0.5,
        relative=0.001,
        cosine_min=0.99,
        tolerance=0.03,
        cosine_tolerance=0.98,
    )
    about = {"device": "cuda", "machine": "x86_64", "versions": {}, "snapshot": store.snapshot}
    keep_record(store.path, ParityRecord(time="2026-11-22T09:00:00Z", rows=(row,), **about))
    facts = StoreTokens(store, ["dinov2", "vivit"]).facts
    assert parity_words(facts["dinov2"]["parity"]) == "within tolerance, relative error 1.0e-03 on cuda, 2026-11-22"
    assert facts["vivit"]["parity"] == {"verdict": "not checked"}


def test_the_data_digest_ignores_order_and_sees_clips_and_samples(store, clips, make_sample):
    source = StoreTokens(store, ["dinov2"])
    ids, samples = [clips[0].clip_id, clips[2].clip_id], [make_sample(0), make_sample(2)]
    digest = source.data_digest(ids, samples)
    assert source.data_digest(ids[::-1], samples[::-1]) == digest
    assert source.data_digest(ids[:1], samples) != digest
    assert source.data_digest(ids, samples[:1]) != digest
    assert StoreTokens(store, ["vivit"]).data_digest(ids, samples) != digest


def test_memory_digests_see_every_bit(tokens, samples):
    ids = [sample.clip_id for sample in samples]
    digest = tokens.data_digest(ids, samples)
    assert tokens.data_digest(ids[::-1], samples[::-1]) == digest
    changed = tokens.fetch(ids)
    changed["vivit"][3, 0, 0, 0, 0] += 1e-3
    assert MemoryTokens(ids, changed).data_digest(ids, samples) != digest


def test_memory_tokens_refuse_other_shapes():
    with pytest.raises(UserError, match=r"must have shape \[2, T, H, W, D\], got \[1, 4, 2, 2, 8\]"):
        MemoryTokens(["a", "b"], {"dinov2": torch.zeros(1, 4, 2, 2, 8)})


def test_memory_tokens_give_their_prefix_and_digest_it(tokens, samples):
    ids = [sample.clip_id for sample in samples]
    held = tokens.fetch(ids)
    prefix = {"dinov2": torch.randn(len(ids), 4, 5, 8)}
    source = MemoryTokens(ids, held, prefix=prefix)
    assert (source.shapes["dinov2"].num_prefix, source.shapes["vivit"].num_prefix) == (5, 0)
    found = source.fetch([ids[3], ids[1]])
    assert torch.equal(found["dinov2"].prefix_BTKD, prefix["dinov2"][[3, 1]])
    assert torch.equal(found["dinov2"].tokens_BTHWD, held["dinov2"][[3, 1]])
    assert torch.equal(found["vivit"], held["vivit"][[3, 1]])
    changed = {"dinov2": prefix["dinov2"].clone()}
    changed["dinov2"][0, 0, 0, 0] += 1e-3
    digests = {MemoryTokens(ids, held, prefix=each).data_digest(ids, samples) for each in (prefix, changed, {})}
    assert len(digests) == 3


def test_memory_prefixes_refuse_other_shapes():
    with pytest.raises(UserError, match=r"must have shape \[1, 4, K, 8\], got \[1, 3, 5, 8\]"):
        MemoryTokens(["a"], {"dinov2": torch.zeros(1, 4, 2, 2, 8)}, prefix={"dinov2": torch.zeros(1, 3, 5, 8)})
