"""The torch dataset: lazily opened, the same from any worker."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from featurestore import FeatureDataset
from featurestore.clips import Sample, Turn
from mervcache.errors import UserError

IDS = [f"tiny/videos/{n}.mp4" for n in range(4)]


@pytest.fixture
def store(kit, make):
    kit.writer().add_clips([make.video(n) for n in range(4)])
    kit.fill()
    kit.fill(make.identity(encoder="vivit", storage_dtype="bfloat16"))
    return kit.open()


def test_items_are_tokens_per_encoder(store):
    item = FeatureDataset(store, IDS, ["dinov2", "vivit"])[2]
    assert item["clip_id"] == IDS[2]
    assert torch.equal(item["dinov2"], torch.from_numpy(store.read(IDS, encoder="dinov2")[2]))
    assert item["dinov2"].dtype == torch.float16
    assert item["vivit"].dtype == torch.float32


def test_samples_come_along_and_text_has_no_tokens(store):
    turns = (Turn(role="human", text="what?"), Turn(role="gpt", text="that"))
    samples = [
        Sample(sample_id=str(n), clip_id=clip_id, turns=turns, stage="align", source="x")
        for n, clip_id in enumerate([IDS[3], None])
    ]
    batch = FeatureDataset(store, samples, ["dinov2"]).__getitems__([1, 0])
    assert [record["sample"] for record in batch] == [samples[1], samples[0]]
    assert ["dinov2" in record for record in batch] == [False, True]


def test_a_pickled_dataset_opens_its_store_anew(store):
    dataset = FeatureDataset(store, IDS, ["dinov2"])
    again = pickle.loads(pickle.dumps(dataset))
    assert again.store is not dataset.store
    assert torch.equal(again[1]["dinov2"], dataset[1]["dinov2"])
    assert again.store.snapshot == store.snapshot


def test_a_spawned_loader_worker_reads_what_the_process_itself_reads(store):
    dataset = FeatureDataset(store, IDS, ["dinov2"])
    loader = DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context="spawn", collate_fn=list)
    records = [record for batch in loader for record in batch]
    assert [record["clip_id"] for record in records] == IDS
    assert torch.equal(
        torch.stack([record["dinov2"] for record in records]),
        torch.from_numpy(store.read(IDS, encoder="dinov2")),
    )


def test_unknown_encoders_are_refused_at_once(store):
    with pytest.raises(UserError, match="encoder 'clip' is not in this store; it has: dinov2, vivit"):
        FeatureDataset(store, IDS, ["clip"])


def stateful(dataset, **options):
    from torchdata.stateful_dataloader import StatefulDataLoader

    generator = torch.Generator().manual_seed(7)
    return StatefulDataLoader(dataset, batch_size=2, shuffle=True, collate_fn=ids_of, generator=generator, **options)


def ids_of(records):
    return [record["clip_id"] for record in records]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stateful_loader_goes_on_where_it_was(store, workers):
    options = {"num_workers": workers} | ({"multiprocessing_context": "spawn"} if workers else {})
    loader = stateful(FeatureDataset(store, IDS, ["dinov2"]), **options)
    batches = iter(loader)
    first, state = next(batches), loader.state_dict()
    second = stateful(FeatureDataset(store, IDS, ["dinov2"]), **options)
    second.load_state_dict(pickle.loads(pickle.dumps(state)))
    rest = list(second)
    assert rest == list(batches)
    assert sorted([*first, *(clip_id for batch in rest for clip_id in batch)]) == IDS


def test_a_state_of_other_data_is_refused(store, kit, make):
    loader = stateful(FeatureDataset(store, IDS, ["dinov2"]))
    next(iter(loader))
    state = loader.state_dict()
    kit.writer().add_clips([make.video(9)])
    kit.fill()
    for other, message in (
        (FeatureDataset(store, IDS[::-1], ["dinov2"]), "other items, another order or other encoders"),
        (FeatureDataset(store, IDS, ["vivit"]), "other items, another order or other encoders"),
        (FeatureDataset(kit.open(), IDS, ["dinov2"]), rf"is of snapshot {store.snapshot} and this dataset reads"),
    ):
        again = stateful(other)
        again.load_state_dict(state)
        with pytest.raises(UserError, match=message):
            next(iter(again))
