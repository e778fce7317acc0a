"""Names and row arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore import layout
from mervcache.errors import StoreFormatError, UserError

ROWS = st.integers(0, 1 << 40)
BLOCK_ROWS = st.integers(1, layout.MAX_BLOCK_ROWS)


@given(ROWS, BLOCK_ROWS)
def test_a_row_lies_in_the_rows_of_its_block(row, block_rows):
    block = layout.block_of(row, block_rows)
    assert row in layout.rows_of(block, block_rows)
    assert layout.rows_of(block, block_rows)[layout.slot_of(row, block_rows)] == row
    assert len(layout.rows_of(block, block_rows)) == block_rows


@given(st.integers(-1, 1 << 40), BLOCK_ROWS)
def test_the_next_batch_starts_a_new_block_right_after_the_last(max_row, block_rows):
    first = layout.first_row_of_next_block(max_row, block_rows)
    assert first % block_rows == 0
    assert max_row < first <= max_row + block_rows
    assert layout.allocated_blocks(max_row, block_rows) == first // block_rows


def test_keys_are_those_of_the_published_layout():
    group = "dinov2-0123456789ab"
    assert layout.part_key(0) == "clips/part-00000.parquet"
    assert layout.samples_key("mix") == "samples/mix.parquet"
    assert layout.samples_key("mix", 2) == "samples/mix.2.parquet"
    assert layout.shard_key("video", group, "tokens", 7) == f"video/{group}/tokens/c/7/0/0/0/0"
    assert layout.shard_key("image", group, "prefix", 7) == f"image/{group}/prefix/c/7/0/0/0"
    assert layout.shard_key("video", group, "scale", 7) == f"video/{group}/scale/c/7/0"
    assert layout.receipt_key("video", group, 12) == f"receipts/video/{group}/00000012.json"


@given(st.integers(0, 99_999_999))
def test_listing_receipts_gives_back_their_blocks(block):
    name = layout.receipt_key("video", "vivit-0123456789ab", block).rsplit("/", 1)[1]
    assert layout.receipt_blocks([name, "notes.txt", "0000001.json", name + "~"]) == {block}


@given(st.sampled_from(["video", "image"]), st.sampled_from(layout.ARRAYS), st.integers(0, 99_999_999))
def test_a_shards_and_a_receipts_key_tell_their_place_back(kind, array, block):
    group = "vivit-0123456789ab"
    assert layout.shard_place(layout.shard_key(kind, group, array, block)) == (kind, group, array, block)
    assert layout.receipt_place(layout.receipt_key(kind, group, block)) == (kind, group, block)


def test_a_records_key_tells_its_name_back():
    keys = [
        *layout.snapshot_keys("00000003-0123456789ab"),
        layout.journal_key("run-1.2"),
        layout.tombstone_key("f" * 16),
    ]
    assert list(map(layout.record_name, keys)) == [*["00000003-0123456789ab"] * 2, "run-1.2", "f" * 16]


@pytest.mark.parametrize(
    "key",
    [
        *(
            "",
            "receipts",
            "receipts/video",
            "receipts/video/dinov2-0123456789ab",
            "zarr.json",
            "clips/part-00000.parquet",
        ),
        *("receipts/video/../x/00000000.json", "receipts/sound/dinov2-0123456789ab/00000000.json"),
        *("receipts/video/dinov2-0123456789ab/0.json", "receipts/video/dinov2-0123456789ab/x/00000000.json"),
        *("video/dinov2-0123456789ab/tokens/c/07/0/0/0/0", "video/dinov2-0123456789ab/tokens/c/7/0/0/0"),
        *("video/dinov2-0123456789ab/tokens/d/7/0/0/0/0", "video/dinov2-0123456789ab/other/c/7/0/0/0/0"),
        *("snapshots/x.json", "snapshots/00000003-0123456789ab.txt", "journal/-.json", "tombstones/a/b.json"),
    ],
)
def test_other_keys_name_no_place(key):
    assert layout.shard_place(key) is None
    assert layout.receipt_place(key) is None
    assert layout.record_name(key) is None


def test_a_lost_clip_part_is_an_error_not_a_gap():
    with pytest.raises(StoreFormatError, match="clip part 1 of 2 is missing"):
        layout.part_numbers(["part-00000.parquet", "part-00002.parquet"])


def test_the_newest_version_of_samples_wins():
    names = ["mix.parquet", "mix.2.parquet", "mix.10.parquet", "other.parquet", "mix.0.parquet", "x.tmp"]
    assert layout.samples_versions(names) == {"mix": 10, "other": 1}


@pytest.mark.parametrize("group", ["../etc-0123456789ab", "dinov2", "a/b-0123456789ab", "dinov2-XYZ", ""])
def test_group_names_that_lead_elsewhere_are_refused(group):
    with pytest.raises(StoreFormatError, match="does not name a feature group"):
        layout.group_prefix("video", group)


@pytest.mark.parametrize("rows", [0, -1, 1 << 17, True, "64", 2.0])
def test_block_rows_must_be_a_sane_integer(rows):
    with pytest.raises(UserError, match=r"block rows of video must be 1\.\.65536"):
        layout.check_block_rows({"video": rows})
