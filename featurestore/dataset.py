"""`FeatureDataset`: a torch dataset over a store, in its own module because torch is heavy.

The store is opened in each loader worker on first use. Start workers by spawn or forkserver
(`multiprocessing_context="spawn"`); a dataset pickles as its store's path, snapshot and the list of items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from featurestore.clips import Sample
from featurestore.store import FeatureStore
from mervcache.errors import UserError
from mervcache.reprs import brief


class FeatureDataset(Dataset[dict[str, Any]]):
    """A torch dataset: item i is {"clip_id": str, ENCODER: tokens_THWD, ...}, and "sample" where samples were given.

    Tokens are float16, or float32 where the storage dtype is another. Text-only samples carry no tokens. It can be
    pickled to workers of a DataLoader, which open the store themselves.

    Parameters
    ----------
    store
        The open store.
    items
        Clip ids, or samples.
    encoders
        Keys of the store; UserError for others and for none.
    """

    def __init__(self, store: FeatureStore, items: Sequence[str] | Sequence[Sample], encoders: Sequence[str]) -> None:
        unknown = [name for name in encoders if name not in store.encoders]
        if unknown or not encoders:
            raise UserError(f"encoders {unknown or '[]'} are not in this store; it has: {', '.join(store.encoders)}")
        self._place = store.__reduce__()[1]
        self._store: FeatureStore | None = store
        self._items = list(items)
        self._encoders = tuple(encoders)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None}

    def __repr__(self) -> str:
        return brief(self, f"of {len(self)} items from {self._place[0]}: {', '.join(self._encoders)}")

    @property
    def store(self) -> FeatureStore:
        """The open store; opened again in a process that received the dataset by pickle."""
        if self._store is None:
            self._store = FeatureStore(*self._place)
        return self._store

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A loader's whole batch: each encoder's rows are read in the order on disk."""
        records: list[dict[str, Any]] = []
        for index in indices:
            item = self._items[index]
            is_sample = isinstance(item, Sample)
            records.append({"clip_id": item.clip_id, "sample": item} if is_sample else {"clip_id": item})
        with_clip = [record for record in records if record["clip_id"] is not None]
        for encoder in self._encoders if with_clip else ():
            stored_BTHWD = self.store.read([record["clip_id"] for record in with_clip], encoder=encoder)
            tokens_BTHWD = torch.from_numpy(stored_BTHWD)  # pyright: ignore[reportUnknownMemberType]: torch has no type
            for record, tokens_THWD in zip(with_clip, tokens_BTHWD, strict=True):
                record[encoder] = tokens_THWD
        return records
