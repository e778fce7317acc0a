"""Rows are allocated once and groups agree with what exists, also under races."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.clips import Sample, Turn
from featurestore.writer import StoreWriter
from mervcache.errors import IdentityConflictError, StoreFormatError, StoreNotFoundError, UserError


def sample(number: int, clip_id: str | None = "tiny/videos/0.mp4") -> Sample:
    turns = (Turn(role="human", text=f"what is {number}?"), Turn(role="gpt", text="a number"))
    return Sample(sample_id=str(number), clip_id=clip_id, turns=turns, stage="finetune", source="test")


def test_rows_count_per_kind_and_each_call_starts_new_blocks(kit, make):
    writer = kit.writer()
    first = writer.add_clips([make.video(0), make.image(0), make.video(1), make.image(1)])
    assert [(row, clip.path) for row, clip in first] == [
        (0, "videos/0.mp4"),
        (0, "images/0.jpg"),
        (1, "videos/1.mp4"),
        (1, "images/1.jpg"),
    ]
    second = writer.add_clips([make.video(1), make.video(2), make.image(1)])
    assert [(row, clip.path) for row, clip in second] == [(4, "videos/2.mp4")]
    assert writer.planned_rows("video", 0) == [0, 1]
    assert writer.planned_rows("video", 1) == [4]
    assert (writer.allocated_blocks("video"), writer.allocated_blocks("image")) == (2, 1)


def test_a_clip_that_has_a_row_gets_none_unless_it_is_a_retry(kit, make):
    writer = kit.writer()
    writer.add_clips([make.video(0), make.video(0), make.video(1)])
    assert writer.add_clips([make.video(0), make.video(1)]) == []
    assert writer.add_clips([make.video(1)], retry=True) == [(4, make.video(1))]
    assert writer.clips()["row"].to_pylist() == [0, 1, 4]


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=5))
def test_every_clip_has_exactly_one_row_and_no_row_two_clips(tmp_path_factory, make, batches):
    kit = make.kit(tmp_path_factory.mktemp("rows") / "store")
    for numbers in batches:
        kit.writer().add_clips([make.video(n) for n in numbers] + [make.image(n) for n in numbers if n % 2])
    table = kit.writer().clips()
    assert sorted(set(table["clip_id"].to_pylist())) == sorted(table["clip_id"].to_pylist())
    placed = list(zip(table["kind"].to_pylist(), table["row"].to_pylist(), strict=True))
    assert len(set(placed)) == len(placed)
    wanted = {n for numbers in batches for n in numbers}
    assert table.num_rows == len(wanted) + sum(n % 2 for n in wanted)


ADD_CLIPS = """
import sys
from featurestore.clips import Clip
from featurestore.writer import StoreWriter
path, *numbers = sys.argv[1:]
writer = StoreWriter.open_or_create(path, block_rows={"video": 4, "image": 3})
for number in map(int, numbers):
    writer.add_clips([Clip(dataset=f"set{number % 3}", path=f"videos/{number}.mp4", kind="video")])
"""


def test_racing_drivers_give_every_clip_one_row_and_lose_no_dataset(kit):
    orders = [[*range(12)], [*range(11, -1, -1)], [5, 1, 9, 3, 7, 11, 0, 2, 4, 6, 8, 10]]
    commands = [[sys.executable, "-c", ADD_CLIPS, str(kit.path), *map(str, order)] for order in orders]
    drivers = [subprocess.Popen(command) for command in commands]
    assert [driver.wait() for driver in drivers] == [0, 0, 0]
    table = kit.writer().clips()
    assert sorted(table["row"].to_pylist()) == [4 * n for n in range(12)]
    assert len(set(table["clip_id"].to_pylist())) == 12
    root = json.loads((kit.path / "zarr.json").read_text())["attributes"]["merv_cache"]
    assert root["datasets"] == ["set0", "set1", "set2"]


def test_clip_parts_are_the_same_bytes_for_the_same_clips(tmp_path, make):
    parts = []
    for name in ("a", "b"):
        make.kit(tmp_path / name).writer().add_clips([make.video(n) for n in range(10)])
        parts.append((tmp_path / name / "clips" / "part-00000.parquet").read_bytes())
    assert parts[0] == parts[1]


def test_block_rows_are_fixed_when_a_store_is_made(kit):
    kit.writer()
    assert StoreWriter.open_or_create(kit.path).block_rows == {"video": 4, "image": 3}
    with pytest.raises(UserError, match="blocks of 4 video rows, got 8"):
        StoreWriter.open_or_create(kit.path, block_rows={"video": 8})


def test_a_folder_with_other_things_in_it_is_not_taken_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match=r"not empty and not a feature store \(it holds 'thesis.tex'\)"):
        StoreWriter.open_or_create(tmp_path)


def test_samples_never_change_and_the_newest_version_wins(kit):
    writer = kit.writer()
    assert writer.add_samples("mix", [sample(1)]) == "samples/mix.parquet"
    first = (kit.path / "samples" / "mix.parquet").read_bytes()
    assert writer.add_samples("mix", [sample(1)]) == "samples/mix.parquet"
    assert writer.add_samples("mix", [sample(1), sample(2)]) == "samples/mix.2.parquet"
    assert writer.add_samples("mix", [sample(1), sample(2)]) == "samples/mix.2.parquet"
    assert (kit.path / "samples" / "mix.parquet").read_bytes() == first
    with pytest.raises(UserError, match="samples name must be"):
        writer.add_samples("../mix", [])


def test_arrays_grow_with_the_rows_given_out_and_never_shrink(kit, make):
    writer = kit.writer()

    def rows(group):
        document = json.loads((kit.path / "video" / group.name / "tokens" / "zarr.json").read_text())
        return document["shape"][0]

    group = kit.group(make.identity())
    assert rows(group) == 0
    writer.add_clips([make.video(0)])
    group = kit.group(make.identity())
    assert rows(group) == 4
    writer.add_clips([make.video(n) for n in range(6)])
    stale = kit.writer()
    writer.grow_groups()
    assert rows(group) == 12
    stale.grow_groups()
    assert rows(group) == 12


def test_a_group_that_exists_is_opened_with_the_same_settings(kit, make):
    first = kit.group(make.identity(), codec="none")
    again = kit.group(make.identity())
    assert again.name == first.name
    assert again.specs["tokens"].codec == "none"
    with pytest.raises(UserError, match="batches of 2 clips, got 3"):
        kit.group(make.identity(), batch_shape=3)
    with pytest.raises(UserError, match="codec 'none', got 'blosc'"):
        kit.group(make.identity(), codec="blosc")


def test_another_identity_of_an_encoder_is_explained_and_needs_consent(kit, make):
    kit.group(make.identity())
    other = make.identity(pooling="none", grid=(4, 4, 4))
    with pytest.raises(IdentityConflictError, match="pooling: stored 'adaptive-avg', requested 'none'") as caught:
        kit.group(other, kind="image")
    assert "grid" in str(caught.value)
    assert "width" not in str(caught.value)
    assert kit.group(other, new_identity=True).name == other.group_name
    assert kit.group(make.identity()).name == make.identity().group_name  # either is known now
    assert kit.group(other).name == other.group_name
    with pytest.raises(IdentityConflictError):
        kit.group(make.identity(pooling="none", grid=(2, 4, 4)))


def test_a_group_folder_that_holds_another_identity_is_refused(kit, make):
    group = kit.group(make.identity())
    document = kit.path / "video" / group.name / "zarr.json"
    record = json.loads(document.read_text())
    for identity in (
        make.identity(layer="another").to_dict(),
        make.identity().to_dict() | {"grid": [4, 2, -2]},
        make.identity().to_dict() | {"grid": "422"},
        make.identity().to_dict() | {"width": 1 << 40},
        {},
        None,
    ):
        record["attributes"]["identity"] = identity
        document.write_text(json.dumps(record))
        with pytest.raises(StoreFormatError):
            kit.writer().open_group("video", group.name)


def test_journal_records_keep_their_digest_and_never_replace_one_another(kit):
    writer = kit.writer()
    assert writer.journal("run-1-driver", {"rate": 1.5}) == "journal/run-1-driver.json"
    assert writer.journal("run-1-driver", {"rate": 2.5}) == "journal/run-1-driver.2.json"
    stored = json.loads((kit.path / "journal" / "run-1-driver.json").read_text())
    assert stored["record"] == {"rate": 1.5}
    assert stored["digest"] == hashlib.sha256(b'{"rate":1.5}').hexdigest()


def test_a_worker_makes_no_store_where_there_is_none(tmp_path):
    with pytest.raises(StoreNotFoundError, match="mount the share"):
        StoreWriter.open(tmp_path / "mount" / "store.zarr")
    assert list(tmp_path.iterdir()) == []


def test_workers_open_groups_that_the_driver_made(kit, make):
    kit.writer().add_clips([make.video(0)])
    kit.group(make.identity())
    identity = replace(make.identity())
    group = StoreWriter.open(kit.path).open_group("video", identity.group_name)
    assert (group.identity, group.missing_blocks(), group.batch_shape) == (identity, [0], 2)
