import numpy as np
import pytest
import torch

from featurestore import Clip, FeatureIdentity, FeatureStore, StoreWriter
from featurestore.errors import UserError
from trainer.tokens import MemoryTokens, StoreTokens

GRIDS = {"dinov2": ((4, 2, 2), 8, 1), "vivit": ((4, 2, 2), 6, 4)}  # grid, width, still period


def identity(encoder):
    grid, width, still_period = GRIDS[encoder]
    return FeatureIdentity(
        encoder=encoder,
        architecture={"class": "Toy"},
        weights_sha256="0" * 64,
        layer="last",
        num_frames=4,
        frame_rule="linspace-32/8",
        decode="frames/1",
        preprocessing={},
        still_period=still_period,
        grid=grid,
        pooling="adaptive-avg",
        width=width,
    )


def write_store(path, clips, tokens, *, failed=()):
    """A real store; `tokens`: encoder -> clip id -> float16 [T, H, W, D]; `failed` pairs are quarantined."""
    writer = StoreWriter.open_or_create(path, block_rows={"video": 4, "image": 4})
    rows = writer.add_clips(clips)
    for encoder in GRIDS:
        for kind in sorted({clip.kind for clip in clips}):
            group = writer.ensure_group(kind, identity(encoder), batch_shape=1, weights_label="random:0")
            mine = {row: clip for row, clip in rows if clip.kind == kind}
            for block in sorted({row // 4 for row in mine}):
                task = group.begin(block)
                for row in range(block * 4, block * 4 + 4):
                    if row in mine and (encoder, mine[row].clip_id) in failed:
                        task.fail(row, "cannot be decoded")
                    elif row in mine:
                        values = {"tokens": tokens[encoder][mine[row].clip_id]}
                        task.add(row, values, media_sha256="0" * 64, decoder="frames/1")
                task.commit()
    return writer


@pytest.fixture
def clips():
    videos = [Clip(dataset="set", path=f"clip{index}.mp4", kind="video") for index in range(6)]
    return [*videos, Clip(dataset="set", path="still.jpg", kind="image")]


@pytest.fixture
def tokens_of(clips):
    random = np.random.default_rng(0)
    return {
        encoder: {
            clip.clip_id: random.standard_normal((*identity(encoder).grid_of(clip.kind), width)).astype(np.float16)
            for clip in clips
        }
        for encoder, (_, width, _) in GRIDS.items()
    }


@pytest.fixture
def store(tmp_path, clips, tokens_of):
    failed = [("vivit", clips[1].clip_id)]
    writer = write_store(tmp_path / "toy.zarr", clips, tokens_of, failed=failed)
    writer.publish_snapshot()
    return FeatureStore.open(tmp_path / "toy.zarr")


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


def test_shapes_and_identities_come_from_the_store(store):
    shape = StoreTokens(store, ["vivit"]).shapes["vivit"]
    assert (shape.grid, shape.width, shape.is_pooled) == ((4, 2, 2), 6, True)
    assert shape.identity == identity("vivit").id


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
