"""Arrow schemas of clips and samples, and conversion of tables to checked values and back.

Apart from `clips` because pyarrow takes half a second to import and `--help` needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import pyarrow as pa

from featurestore.clip_names import clip_of_id
from featurestore.clips import Clip, Sample
from mervcache.errors import StoreFormatError, UserError
from mervcache.memory import gc_paused

CLIP_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("end_frame", pa.int64()),
        pa.field("kind", pa.string(), nullable=False),
    ]
)

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("clip_id", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field(
            "turns",
            pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("text", pa.string())])),
            nullable=False,
        ),
        pa.field("options", pa.list_(pa.string()), nullable=False),
        pa.field("answer_index", pa.int64()),
    ]
)

WINDOW_SCHEMA = pa.schema(
    [
        pa.field("window", pa.int64(), nullable=False),  # its number in the video, from 0
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("has_tokens", pa.bool_(), nullable=False),
    ]
)

EMPTY_QUARANTINE = pa.schema(
    [(name, pa.string()) for name in ("clip_id", "path", "encoder", "reason", "scope")]
).empty_table()


def windows_to_table(windows: Mapping[int, str], has_tokens: Sequence[bool]) -> pa.Table:
    """Number -> clip id of a video's windows, and which have tokens -> a table of `WINDOW_SCHEMA`."""
    spans = [clip_of_id(clip_id, "video") for clip_id in windows.values()]
    starts, ends = [clip.start_s for clip in spans], [clip.end_s for clip in spans]
    columns = (list(windows), list(windows.values()), starts, ends, list(has_tokens))
    return pa.Table.from_pydict(dict(zip(WINDOW_SCHEMA.names, columns, strict=True)), schema=WINDOW_SCHEMA)


def clips_to_table(rows: Iterable[tuple[int, Clip]]) -> pa.Table:
    """(row, clip) pairs -> a table of `CLIP_SCHEMA`."""
    pairs = list(rows)
    columns: dict[str, list[Any]] = {"row": [row for row, _ in pairs]}
    for name in CLIP_SCHEMA.names[1:]:  # column by column: a dict per clip takes three times as long
        value_of = attrgetter(name)
        columns[name] = [value_of(clip) for _, clip in pairs]
    return pa.Table.from_pydict(columns, schema=CLIP_SCHEMA)


def table_to_clips(table: pa.Table) -> list[tuple[int, Clip]]:
    """A table of `CLIP_SCHEMA` -> (row, clip) pairs, every clip checked."""
    pairs: list[tuple[int, Clip]] = []
    try:
        with gc_paused():
            columns = [table[name].to_pylist() for name in CLIP_SCHEMA.names]  # a dict per clip: three times as long
            for row, clip_id, dataset, path, start_s, end_s, end_frame, kind in zip(*columns, strict=True):
                clip = Clip(dataset=dataset, path=path, kind=kind, start_s=start_s, end_s=end_s, end_frame=end_frame)
                if clip.clip_id != clip_id:
                    raise UserError(
                        f"clip id {clip_id!r} does not belong to its own path and span, expected {clip.clip_id!r}"
                    )
                pairs.append((row, clip))
    except (TypeError, KeyError, UserError) as error:
        raise StoreFormatError(f"clip parts hold something that is no clip: {error}") from error
    return pairs


def samples_to_table(samples: Iterable[Sample]) -> pa.Table:
    """Samples -> a table of `SAMPLE_SCHEMA`, in the order given."""
    return pa.Table.from_pylist([sample.to_record() for sample in samples], schema=SAMPLE_SCHEMA)


def table_to_samples(table: pa.Table) -> list[Sample]:
    """A table of `SAMPLE_SCHEMA` -> samples."""
    try:
        with gc_paused():
            return [Sample.from_record(record) for record in table.to_pylist()]
    except (TypeError, KeyError, AttributeError, UserError) as error:
        raise StoreFormatError(f"samples hold something that is no conversation: {error}") from error
