"""A split is cut out with its conversations, so that held-out samples never travel with those to train on."""

from __future__ import annotations

import pytest

from featurestore.clips import Sample, Turn
from featurestore.maintenance.verify import verify_store
from featurestore.transfer.export import ExportCells, export
from featurestore.transfer.merge import StoreCells, combine
from featurestore.transfer.selection import Selection
from featurestore.transfer.sync import transfer
from mervcache.errors import UserError

TURNS = (Turn(role="human", text="what?"), Turn(role="gpt", text="that"))


@pytest.fixture
def mixed(kit, make):
    """Videos 0 and 1 to train on, 1 and 2 held out, 3 without a conversation; texts of both; a clip not stored."""
    kit.writer().add_clips([make.video(n) for n in range(4)])
    wanted = [
        ("train", 0),
        ("train", 1),
        ("heldout", 1),
        ("heldout", 2),
        ("train", None),
        ("heldout", None),
        ("train", 9),
    ]
    kit.writer().add_samples(
        "mix",
        [
            Sample(
                sample_id=f"{split}-{n}",
                clip_id=None if n is None else make.video(n).clip_id,
                turns=TURNS,
                stage="finetune",
                split=split,
                source="tests",
            )
            for split, n in wanted
        ],
    )
    kit.fill()
    return kit


def content(store) -> tuple[list[str], list[str]]:
    return sorted(store.clips["path"].to_pylist()), sorted(sample.sample_id for sample in store.samples())


def test_a_subset_of_a_split_holds_its_clips_and_its_conversations(mixed, make, tmp_path):
    for split, numbers in (("train", (0, 1)), ("heldout", (1, 2))):
        out = make.kit(tmp_path / f"{split}.zarr")
        combine([StoreCells(mixed.path)], out.path, selection=Selection(split=split))
        assert content(out.open()) == (
            [f"videos/{n}.mp4" for n in numbers],
            sorted([*(f"{split}-{n}" for n in numbers), f"{split}-None"]),
        )
        assert verify_store(out.path, "full") == []


def test_an_export_of_a_split_holds_the_same(mixed, make, tmp_path):
    export(StoreCells(mixed.path), tmp_path / "files", format="safetensors", selection=Selection(split="heldout"))
    out = make.kit(tmp_path / "out.zarr")
    combine([ExportCells(tmp_path / "files")], out.path)
    assert content(out.open()) == (["videos/1.mp4", "videos/2.mp4"], ["heldout-1", "heldout-2", "heldout-None"])


def test_a_split_and_a_list_of_clips_narrow_each_other(mixed, make, tmp_path):
    both = Selection(split="train", clips=frozenset(make.video(n).clip_id for n in (1, 2)))
    out = make.kit(tmp_path / "out.zarr")
    combine([StoreCells(mixed.path)], out.path, selection=both)
    assert content(out.open()) == (["videos/1.mp4"], ["train-1"])


def test_a_split_that_no_conversation_has_is_refused(mixed, tmp_path):
    with pytest.raises(UserError, match="unknown split 'held-out', the nearest known one is 'heldout'"):
        combine([StoreCells(mixed.path)], tmp_path / "out.zarr", selection=Selection(split="held-out"))


def test_a_push_cannot_cut_a_split(mixed, tmp_path):
    with pytest.raises(UserError, match="make a `merv-pipeline subset` of it first"):
        transfer(mixed.path, tmp_path / "out.zarr", selection=Selection(split="train"))
