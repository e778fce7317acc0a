"""`FeatureStore`: the committed clips, tokens and samples of a store, read-only.

    from featurestore import FeatureStore
    store = FeatureStore.open("features/demo.zarr")
    tokens_BTHWD = store.read(store.clips["clip_id"].to_pylist()[:8], encoder="dinov2")

A store is opened at a snapshot and stays there, so its content never changes while it is open. It pickles as its path
and snapshot; data-loader workers open it anew on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.clips import Sample
from featurestore.encoder_keys import encoder_keys, find_key
from featurestore.identity import FeatureIdentity
from featurestore.layout import (
    JOURNAL,
    ROOT_METADATA,
    journal_key,
    journal_names,
    receipt_blocks,
    receipts_prefix,
)
from featurestore.locate import Place, no_store_at, place_of
from featurestore.newest import Newest, read_newest
from featurestore.objects.base import Objects, get_bounded
from featurestore.objects.open import open_cached
from featurestore.parquet import named_table_file, read_table
from featurestore.pooling import FloatDtype, Pool, clips_at_once, float_dtype, pool_tokens
from featurestore.reader import BatchReader, ClipLines, Frames
from featurestore.records import (
    MAX_JOURNAL_BYTES,
    Tombstone,
    driver_runs,
    media_of_rows,
    parse_journal,
    read_tombstone,
)
from featurestore.schemas import (
    EMPTY_QUARANTINE,
    SAMPLE_SCHEMA,
    table_to_samples,
    windows_to_table,
)
from featurestore.snapshots import column, load_snapshot, read_clip_parts, read_snapshot_table
from featurestore.store_html import store_html
from featurestore.tags import read_tags, resolve_snapshot
from featurestore.token_maps import plot_maps, spread_steps
from featurestore.windows import WindowIndexes, spread_windows
from featurestore.zarr_metadata import parse_root, read_document
from mervcache.errors import (
    ClipUnavailableError,
    StoreError,
    StoreNotFoundError,
    UserError,
    missing_extra,
)
from mervcache.files import sha256_hex
from mervcache.reprs import brief

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class FeatureStore:
    """A read-only store at one snapshot; make one with `FeatureStore.open`."""

    def __init__(
        self,
        path: str,
        snapshot: str,
        cache: Place | bool = True,
        cache_bytes: int | None = None,
        *,
        objects: Objects | None = None,  # of the path, where the caller has opened them
        newest: Newest | None = None,  # of the objects, where the caller has read it
    ) -> None:
        self.path = path
        self.snapshot = snapshot  # id: SEQUENCE-DIGEST12
        self._cache_settings = (cache, cache_bytes)
        self._objects = open_cached(path, cache, cache_bytes) if objects is None else objects
        self._record = load_snapshot(self._objects, snapshot)
        self._batches = BatchReader(self._objects)
        self._groups = {key: identity.group_name for key, identity in self.encoders.items()}
        names = [column(group, "row") for group in self._groups.values()]
        table = read_snapshot_table(self._objects, self._record, ["clip_id", "kind", *names])
        self._clip_ids = table["clip_id"].combine_chunks()
        self._windows = WindowIndexes(self._clip_ids.to_pylist)
        self._is_image = table["kind"].to_numpy(zero_copy_only=False) == "image"
        self._rows = {group: table[column(group, "row")].to_numpy() for group in self._groups.values()}
        # Removals apply to every snapshot, also to those that were made before; lines keep their place.
        self.tombstones: dict[str, Tombstone] = {  # by id
            name: read_tombstone(self._objects, name) for name in (newest or read_newest(self._objects)).tombstones
        }
        self._removed = {clip: tombstone for tombstone in self.tombstones.values() for clip in tombstone.clips}
        self._is_hidden = np.zeros(len(self._clip_ids), dtype=bool)
        if self._removed:
            is_removed = pc.is_in(self._clip_ids, pa.array(sorted(self._removed), pa.string()))
            self._is_hidden = is_removed.to_numpy(zero_copy_only=False)
            self._rows = {group: np.where(self._is_hidden, -1, rows) for group, rows in self._rows.items()}

    @classmethod
    def open(
        cls,
        path: Place,
        *,
        snapshot: str | None = None,
        cache: Place | bool = True,
        cache_bytes: int | None = None,
    ) -> FeatureStore:
        """Open a store read-only at its newest snapshot.

        Parameters
        ----------
        path
            A folder, or a URL: s3, gs, az, https or hf.
        snapshot
            Id or tag of another snapshot.
        cache
            Folder for reads from a URL (default: MERV_CACHE_DIR, else ~/.cache/merv-cache); False caches nothing.
        cache_bytes
            Bound of that folder (default: MERV_CACHE_BYTES, else 50 GB).

        Raises
        ------
        StoreNotFoundError
            No store is there.
        StoreError
            The store has no such snapshot, or none yet.
        """
        path = place_of(path)
        objects = open_cached(path, cache, cache_bytes)
        try:
            parse_root(read_document(objects, ROOT_METADATA))
        except FileNotFoundError:
            raise StoreNotFoundError(no_store_at(path)) from None
        newest = read_newest(objects)
        snapshot = resolve_snapshot(objects, snapshot) if snapshot else newest.snapshot
        if snapshot is None:
            raise StoreError(
                f"{path} has no snapshot yet: extraction makes one every few minutes and at its end; wait for it, or "
                "run the same `merv-pipeline extract` again to finish it"
            )
        return cls(str(path), snapshot, cache, cache_bytes, objects=objects, newest=newest)

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Any, ...]]:
        return (FeatureStore, (self.path, self.snapshot, *self._cache_settings))

    def __repr__(self) -> str:
        return brief(self, f"{self.path} at {self.snapshot}: {len(self)} clips of {', '.join(self._groups)}")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return store_html(self.info(), {key: (self.encoders[key], name) for key, name in self._groups.items()})

    def __len__(self) -> int:
        return len(self._clip_ids) - int(np.count_nonzero(self._is_hidden))

    @cached_property
    def encoders(self) -> dict[str, FeatureIdentity]:
        """Identities by key: the encoder's name where unique, else `name@TxHxW` where grids differ, else `name@id6`."""
        return encoder_keys(group.identity for group in self._record.groups.values())

    def encoder_key(self, encoder: str) -> str:
        """The key in `encoders` of `encoder`: a name, `name@TxHxW`, or `name@` and at least six digits of the id.

        UserError lists the choices where it is unknown or fits several identities.
        """
        return find_key(encoder, self.encoders)

    @cached_property
    def clips(self) -> pa.Table:
        """clip_id, dataset, path, start_s, end_s, end_frame, kind, and a column per encoder key: True if committed."""
        return self._visible(
            self._with_encoders(read_clip_parts(self._objects, self._record, self._clip_ids).drop_columns(["row"]))
        )

    @cached_property
    def committed(self) -> pa.Table:
        """clip_id, kind and the encoder columns of `clips`: of the open snapshot, where `clips` reads other files."""
        kinds = pa.array(np.where(self._is_image, "image", "video"), pa.string())
        return self._visible(self._with_encoders(pa.table({"clip_id": self._clip_ids, "kind": kinds})))

    @property
    def quarantine(self) -> pa.Table:
        """clip_id, path, encoder, reason, scope of every clip whose newest attempt failed and that has no tokens."""
        paths = read_clip_parts(self._objects, self._record, self._clip_ids)["path"]
        tables: list[pa.Table] = []
        for key, group in self._groups.items():
            names = [column(group, suffix) for suffix in ("failed_row", "failed_reason", "failed_scope")]
            table = read_snapshot_table(self._objects, self._record, names)
            failed = (table[names[0]].to_numpy() >= 0) & (self._rows[group] < 0) & ~self._is_hidden
            lines = pa.array(np.flatnonzero(failed))
            columns = [self._clip_ids.take(lines), paths.take(lines), pa.array([key] * len(lines), pa.string())]
            columns += [table[names[1]].take(lines), table[names[2]].take(lines)]
            tables.append(pa.table(columns, names=["clip_id", "path", "encoder", "reason", "scope"]))
        return pa.concat_tables(tables) if tables else EMPTY_QUARANTINE

    @property
    def sample_names(self) -> list[str]:
        """Names of the sets of conversations, sorted."""
        return sorted(self._record.samples)

    @property
    def tags(self) -> dict[str, str]:
        """Tag -> id of the snapshot that it names, of the whole store."""
        return {name: tag.snapshot for name, tag in read_tags(self._objects).items()}

    @property
    def sample_keys(self) -> dict[str, str]:
        """Samples name -> key of the Parquet file that holds its current version."""
        return {name: self._record.samples[name]["key"] for name in self.sample_names}

    def samples(self, name: str | None = None) -> list[Sample]:
        """Conversations of one `name`, or of all names in order.

        UserError for an unknown name, StoreDamagedError for a file that differs from the snapshot's digest.
        """
        if name is not None and name not in self._record.samples:
            raise UserError(f"samples {name!r} are not in this store; it has: {', '.join(self.sample_names) or 'none'}")
        samples: list[Sample] = []
        for each in self.sample_names if name is None else [name]:
            entry = self._record.samples[each]
            for tombstone in self.tombstones.values():
                if entry["sha256"] in tombstone.erased:
                    raise StoreError(
                        f"the samples {each!r} of snapshot {self.snapshot} held conversations about clips removed on "
                        f"{tombstone.date} ({tombstone.reason}); open the newest snapshot, which has the others"
                    )
            data = named_table_file(self._objects, entry["key"], entry["sha256"])
            samples.extend(table_to_samples(read_table(data, SAMPLE_SCHEMA, entry["key"])))
        return [sample for sample in samples if sample.clip_id not in self._removed]

    def journal(self, prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
        """(name, record) of runs, workers and measurements whose name starts with `prefix`.

        Records are provenance and part of no digest.
        """
        names = [name for name in journal_names(self._objects.list_names(JOURNAL)) if name.startswith(prefix)]
        texts = ((name, get_bounded(self._objects, journal_key(name), MAX_JOURNAL_BYTES)) for name in names)
        return [(name, parse_journal(text, name)) for name, text in texts]

    def runs(self) -> list[dict[str, Any]]:
        """Records of the extractions that wrote to this store, oldest first; damaged ones are skipped."""
        return driver_runs(self._objects)

    @property
    def canaries(self) -> dict[str, str]:
        """ "kind/group" -> sha256 of its reference clips' file, where it has one."""
        return dict(self._record.canaries)

    def rows(self, clip_ids: Sequence[str], *, encoder: str) -> np.ndarray:
        """int64 [B]: the row of each of `clip_ids` in the array of its kind, -1 where it has no tokens.

        UserError for an unknown `encoder` and for clips of several kinds, ClipUnavailableError for an unknown clip.
        """
        lines = self._lines(clip_ids)
        if len(set(self._is_image[lines].tolist())) > 1:
            raise UserError("rows count in one array, and these clips are in several (image, video)")
        return self._rows[self._groups[self.encoder_key(encoder)]][lines]

    def read(
        self,
        clip_ids: Sequence[str],
        *,
        encoder: str,
        frames: Frames = None,
        out: np.ndarray | None = None,
        pool: Pool | None = None,
        dtype: FloatDtype | None = None,
    ) -> np.ndarray:
        """Tokens as floats [B, T, H, W, D], or with `pool` one vector per clip [B, D].

        Tokens stored as float16 come as float16, others as float32. **NumPy sums float16 in float16**: `.std()` and
        `.sum()` of a batch of such tokens overflow to inf or NaN. Read with `dtype="float32"`, or with `pool`, to
        compute with them.

        Parameters
        ----------
        clip_ids
            B clips, videos or stills.
        encoder
            A key of `encoders`.
        frames
            Time steps to read, a slice or indices; a still's steps repeat.
        out
            An array to read into, e.g. pinned. Without it, memory of arrays that are gone is used again.
        pool
            "mean" or "max" over time, height and width, as float32. Of many clips a part at a time is in memory.
        dtype
            "float32" or "float64", which hold every stored value; with `pool` also what the mean is summed in.

        Raises
        ------
        ClipUnavailableError
            For a clip without tokens of this encoder.
        UserError
            For an unknown encoder, pool or dtype, for steps outside the grid, and for `out` with `pool` or `dtype`.
        """
        if pool is None and dtype is None:
            return self._batches.read("tokens", *self._locate(clip_ids, encoder), frames, out)
        if out is not None:
            raise UserError("out takes tokens as they are read: leave out pool and dtype, or leave out `out`")
        identity, rows, is_image = self._locate(clip_ids, encoder)
        result_dtype = float_dtype("float32" if dtype is None else dtype)
        if pool is None:
            return self._batches.read("tokens", identity, rows, is_image, frames).astype(result_dtype, copy=False)
        at_once = clips_at_once(identity)
        parts = [slice(start, start + at_once) for start in range(0, max(1, len(rows)), at_once)]
        pooled = (
            pool_tokens(self._batches.read("tokens", identity, rows[part], is_image[part], frames), pool, result_dtype)
            for part in parts
        )
        return np.concatenate(list(pooled))

    def to_pandas(self) -> pd.DataFrame:
        """`clips` as a pandas DataFrame; UserError where pandas is not installed."""
        try:
            importlib.import_module("pandas")  # pyarrow's own message does not say what to install
        except ModuleNotFoundError as error:
            raise UserError(missing_extra(error) or str(error)) from error
        return self.clips.to_pandas()

    def plot(
        self, clip_ids: str | Sequence[str], *, encoders: Sequence[str] | None = None, num_steps: int = 8
    ) -> Figure:
        """Token maps of the clips `clip_ids` as a matplotlib figure: a row per encoder, a column per time step.

        Colours are the first three principal components of an encoder's tokens of these clips. A store holds no
        frames: `merv-pipeline view` shows them next to the maps. By default all encoders that have the clips are shown,
        and at most `num_steps` time steps, evenly spaced. UserError where matplotlib is not installed.
        """
        ids = [clip_ids] if isinstance(clip_ids, str) else list(clip_ids)
        if not ids or num_steps < 1:
            raise UserError(f"plot needs at least one clip and one step, got {len(ids)} and num_steps={num_steps}")
        lines = self._lines(ids)
        complete = [key for key, group in self._groups.items() if (self._rows[group][lines] >= 0).all()]
        shown = (complete or list(self._groups)) if encoders is None else list(map(self.encoder_key, encoders))
        maps: dict[str, dict[str, np.ndarray]] = {clip_id: {} for clip_id in ids}
        for clip_id, is_image in zip(ids, self._is_image[lines], strict=True):
            for key in shown:
                stored = self.encoders[key].grid_of("image" if is_image else "video")[0]
                steps = spread_steps(stored, num_steps)
                maps[clip_id][key] = self.read([clip_id], encoder=key, frames=steps)[0]
        return plot_maps(maps)

    def windows(self, clip_id: str, *, encoder: str) -> pa.Table:
        """`WINDOW_SCHEMA`: the windows of a video, in their order; `clip_id` is that of the video or of a span of it.

        Empty where the store has none of it; UserError for an encoder whose tokens are of whole clips.
        """
        key = self.encoder_key(encoder)
        found = self._windows.of(key, self.encoders[key].frame_rule).windows(clip_id)
        rows = self._rows[self._groups[key]][self._line_of.find(list(found.values()))]
        return windows_to_table(found, (rows >= 0).tolist())

    def read_windows(
        self,
        clip_id: str,
        *,
        encoder: str,
        limit: int | None = None,
        skip_failed: bool = False,
        frames: Frames = None,
        dtype: FloatDtype | None = None,
    ) -> np.ndarray:
        """Tokens of the windows of `clip_id` as floats [windows, T, H, W, D], in their order.

        `encoder`, `frames` and `dtype` are as in `read`. Of more than `limit` windows, so many are read, spread evenly
        over the video. Windows without tokens are left out with `skip_failed`; else they are a ClipUnavailableError, as
        is a video that has no windows here.
        """
        windows = self.windows(clip_id, encoder=encoder)
        if not windows.num_rows:
            raise ClipUnavailableError(f"the store has no windows of {clip_id!r}; see store.clips for its clips")
        chosen = spread_windows(windows["clip_id"].to_pylist(), limit)
        if skip_failed:
            has_tokens = set(windows.filter(windows["has_tokens"])["clip_id"].to_pylist())
            chosen = [window for window in chosen if window in has_tokens]
        return self.read(chosen, encoder=encoder, frames=frames, dtype=dtype)

    def read_prefix(self, clip_ids: Sequence[str], *, encoder: str, frames: Frames = None) -> np.ndarray:
        """Class and register tokens of B clips as floats [B, T, K, D]; `frames` chooses time steps as in `read`.

        UserError for an `encoder` stored without them, ClipUnavailableError if one of `clip_ids` has no tokens.
        """
        if not self.encoders[self.encoder_key(encoder)].prefix_tokens:
            raise UserError(f"{encoder} was stored without prefix tokens; extract it with prefix tokens to have them")
        return self._batches.read("prefix", *self._locate(clip_ids, encoder), frames)

    def media_sha256(self, *, encoder: str) -> dict[str, str]:
        """Clip id -> sha256 of the media behind its tokens of `encoder`, where receipts record it."""
        group = self._groups[self.encoder_key(encoder)]
        found: dict[str, str] = {}
        for kind, is_kind in (("image", self._is_image), ("video", ~self._is_image)):
            lines = np.flatnonzero(is_kind & (self._rows[group] >= 0))
            rows = self._rows[group][lines].tolist()
            media = media_of_rows(self._objects, kind, group, rows, self._record.block_rows[kind])
            ids = self._clip_ids.take(pa.array(lines)).to_pylist()
            found |= {clip_id: sha256 for clip_id, sha256 in zip(ids, media, strict=True) if sha256}
        return found

    def data_digest(self, clip_ids: Iterable[str], encoders: Sequence[str], samples: Iterable[Sample] = ()) -> str:
        """64 hex digits over (clip, identity, row digest) of `clip_ids` with `encoders`, and over `samples`.

        Their order does not matter. Equal for copies, pulls and unions of the same data. ClipUnavailableError for
        an unknown clip.
        """
        distinct = sorted(set(clip_ids))
        lines = self._lines(distinct)
        parts: list[str] = []
        names = {key: column(self._groups[key], "digest") for key in map(self.encoder_key, encoders)}
        if names:
            table = read_snapshot_table(self._objects, self._record, list(names.values()))
            for key, name in names.items():
                digests = table[name].take(pa.array(lines)).to_pylist()
                identity = self.encoders[key].id
                parts += [f"clip\t{c}\t{identity}\t{d}" for c, d in zip(distinct, digests, strict=True)]
        parts += [f"sample\t{sample.digest}" for sample in samples]
        return sha256_hex("\n".join(sorted(parts)).encode())

    def info(self) -> dict[str, Any]:
        """Clips by kind, and by group name: weights label, rows by kind and state, bytes stored."""
        groups: dict[str, dict[str, Any]] = {}
        for name, summary in self._record.groups.items():
            kind, group = name.split("/")
            entry = groups.setdefault(group, {"weights": summary.weights, "rows": {}, "stored_bytes": 0})
            entry["rows"][kind] = dict(summary.counts)
            entry["stored_bytes"] += summary.stored_bytes
        num_images = int((self._is_image & ~self._is_hidden).sum())
        return {
            "path": self.path,
            "snapshot": self.snapshot,
            "clips": {"video": len(self) - num_images, "image": num_images},
            "samples": self.sample_names,
            "groups": groups,
            "stored_bytes": sum(entry["stored_bytes"] for entry in groups.values()),
        }

    def stored_bytes(self, identity: FeatureIdentity, kind: str) -> tuple[int, int]:
        """(bytes of the shards, clips that they hold) of an encoder, given by its `identity`, and a kind."""
        summary = self._record.groups.get(f"{kind}/{identity.group_name}")
        return (summary.stored_bytes, summary.counts["ok"]) if summary else (0, 0)

    def unpublished_blocks(self) -> int:
        """Blocks committed since this snapshot: a killed run may leave some, which its next run publishes."""
        count = 0
        for name, group in self._record.groups.items():
            committed = receipt_blocks(self._objects.list_names(receipts_prefix(*name.split("/"))))
            count += len(committed - {int(block) for block in group.receipts})
        return count

    def _locate(self, clip_ids: Sequence[str], encoder: str) -> tuple[FeatureIdentity, np.ndarray, np.ndarray]:
        """(identity, rows, which are stills) of clips that all have tokens; ClipUnavailableError otherwise."""
        key, lines = self.encoder_key(encoder), self._lines(clip_ids)
        rows = self._rows[self._groups[key]][lines]
        if (rows < 0).any():
            first = clip_ids[int(np.flatnonzero(rows < 0)[0])]
            raise ClipUnavailableError(
                f"{int((rows < 0).sum())} of {len(rows)} clips have no committed tokens of {encoder}, the first is "
                f"{first!r}; see store.clips for what is committed and store.quarantine for why not"
            )
        return self.encoders[key], rows, self._is_image[lines]

    def _with_encoders(self, table: pa.Table) -> pa.Table:
        for key, group in self._groups.items():
            table = table.append_column(key, pa.array(self._rows[group] >= 0))
        return table

    def _visible(self, table: pa.Table) -> pa.Table:
        return table.filter(pa.array(~self._is_hidden)) if self._removed else table

    @cached_property
    def _line_of(self) -> ClipLines:
        return ClipLines(self._clip_ids)

    def _lines(self, clip_ids: Sequence[str]) -> np.ndarray:
        if isinstance(clip_ids, str):
            raise UserError(f"clip_ids must be a list of clip ids, got the one text {clip_ids!r}")
        lines = self._line_of.find(list(clip_ids))
        if self._removed and self._is_hidden[lines].any():
            gone = clip_ids[int(np.flatnonzero(self._is_hidden[lines])[0])]
            tombstone = self._removed[gone]
            raise ClipUnavailableError(
                f"clip {gone!r} was removed from this store on {tombstone.date}: {tombstone.reason}; leave it out"
            )
        return lines
