"""`FeatureDataset`: a torch dataset over a store, in its own module because torch is heavy.

The store is opened in each loader worker on first use. Start workers by spawn or forkserver
(`multiprocessing_context="spawn"`); a dataset pickles as its store's path, snapshot and the list of items. In a
StatefulDataLoader the loader keeps the place in the epoch, and the dataset checks that it is still the same data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset

from featurestore.clips import Sample
from featurestore.store import FeatureStore
from mervcache.errors import UserError
from mervcache.files import record_digest, sha256_hex
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
        Encoders as for `FeatureStore.encoder_key`, by which items name their tokens; UserError for others and for none.
    """

    def __init__(self, store: FeatureStore, items: Sequence[str] | Sequence[Sample], encoders: Sequence[str]) -> None:
        if not encoders:
            raise UserError(f"a dataset reads at least one encoder; this store has: {', '.join(store.encoders)}")
        for name in encoders:
            store.encoder_key(name)
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

    def state_dict(self) -> dict[str, Any]:
        """What the items are: the snapshot, and a digest of the items in their order and of the encoders' identities.

        torchdata's StatefulDataLoader saves it with its own place in the epoch.
        """
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a saved state is that of this dataset; a place in other items would mean nothing.

        Raises
        ------
        UserError
            For the state of another snapshot, of other items or in another order, or of other encoders.
        """
        if dict(state) == self._state:
            return
        if state.get("snapshot") != self._state["snapshot"]:
            raise UserError(
                f"the loader's state is of snapshot {state.get('snapshot')} and this dataset reads "
                f"{self._state['snapshot']}: open the store with FeatureStore.open(..., snapshot=...) to go on"
            )
        raise UserError("the loader's state is of other items, another order or other encoders: make the same dataset")

    @cached_property
    def _state(self) -> dict[str, Any]:
        items = [item.digest if isinstance(item, Sample) else item for item in self._items]
        identities = {name: self.store.encoders[self.store.encoder_key(name)].id for name in self._encoders}
        digest = record_digest({"items": sha256_hex("\n".join(items).encode()), "encoders": identities})
        return {"snapshot": self.store.snapshot, "digest": digest}

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
