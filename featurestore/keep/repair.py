"""Repair: what `verify` finds damaged is put right, and nothing else is touched.

Comes in: a store, perhaps another copy of it, perhaps a way to compute blocks again. Goes out: what was done, object by
object. In order: what others are checked by comes first (removals, snapshots, clip parts, documents), then receipts,
then shards. Every step replaces one object whole, so a repair that was killed is simply run again. What cannot be put
right stays as it is and is named. How a file is mended stands in `repair_files.py` and `repair_shards.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from featurestore.errors import MervCacheError, StoreNotFoundError
from featurestore.find import Place, no_store_at
from featurestore.keep.erase import erase_tombstoned
from featurestore.keep.findings import Finding
from featurestore.keep.repair_files import FileMender, MakeCanaries, open_group
from featurestore.keep.repair_shards import Recompute, Repaired, mend_block
from featurestore.keep.verify import Verification
from featurestore.layout import (
    CANARIES,
    JOURNAL,
    PARTS,
    RECEIPTS,
    ROOT_METADATA,
    SAMPLES,
    SNAPSHOTS,
    TOMBSTONES,
    shard_place,
)
from featurestore.lease import StoreLease
from featurestore.places.by_url import open_objects
from featurestore.places.objects import Objects
from featurestore.progress import SILENT, Progress
from featurestore.writer import StoreWriter

_PASSES = 12  # there are nine classes of files
_ORDER = (TOMBSTONES, SNAPSHOTS, PARTS, SAMPLES, ROOT_METADATA, RECEIPTS, CANARIES, JOURNAL)


def repair_store(
    path: Place,
    *,
    other: Place | None = None,
    recompute: Recompute | None = None,
    canaries: MakeCanaries | None = None,
    new_bytes: bool = False,
    say: Callable[[Repaired], None] = lambda done: None,
    progress: Progress = SILENT,
) -> list[Repaired]:
    """Put right what a full verification finds; [] for a sound store, which is left exactly as it is.

    `progress` is that of the full look, which is taken again where documents had to be mended.
    """
    objects = open_objects(path)
    if not objects.exists(ROOT_METADATA) and not any(map(objects.list_names, (PARTS, SNAPSHOTS))):
        raise StoreNotFoundError(no_store_at(path))  # before a lease makes a folder there
    with StoreLease(path, "repair"):
        copy = open_objects(other) if other is not None else None
        work = _Repair(objects, copy, FileMender(objects, copy, canaries), say, progress)
        work.documents()
        work.shards(recompute, new_bytes)
        work.publish(path)
    return work.done


class _Repair:
    """One pass of mending over a store."""

    def __init__(
        self,
        objects: Objects,
        other: Objects | None,
        files: FileMender,
        say: Callable[[Repaired], None],
        progress: Progress,
    ) -> None:
        self._objects, self._other, self._files, self._say = objects, other, files, say
        self._progress = progress
        self.done: list[Repaired] = []
        self._settled: set[str] = set()  # keys that are not looked at again
        self._check = Verification(objects, is_full=False)

    def documents(self) -> None:
        """Everything but shards, one class of files at a time: what is mended lets the next look see further.

        The full look, which reads every byte, comes last.
        """
        for is_full in (False, True):
            for _ in range(_PASSES):
                progress = self._progress if is_full else SILENT
                check = Verification(self._objects, is_full=is_full, progress=progress)
                check.run()
                self._check = check
                keys = {finding.key for finding in _damage(check) if self._is_document(finding.key)}
                if not keys:
                    break
                first = min(map(_order, keys))[0]
                for key in sorted(key for key in keys if _order(key)[0] == first):
                    self._note(self._files.mend(key, check))

    def shards(self, recompute: Recompute | None, new_bytes: bool) -> None:
        """Shards that the last, full verification found damaged."""
        wanted: dict[tuple[str, str, int], set[str]] = {}
        for finding in _damage(self._check):
            if place := shard_place(finding.key):
                kind, group, array, block = place
                wanted.setdefault((kind, group, block), set()).add(array)
        for (kind, group, block), arrays in sorted(wanted.items()):
            try:
                writer = open_group(self._objects, kind, group)
                done = mend_block(writer, block, arrays, other=self._other, recompute=recompute, new_bytes=new_bytes)
            except (MervCacheError, FileNotFoundError) as error:
                done = [Repaired(key=f"{kind}/{group} block {block}", done=str(error), is_mended=False)]
            for each in done:
                self._note(each)

    def publish(self, path: Place) -> None:
        """A new snapshot where receipts are others than the newest one names; nothing where it says the same."""
        if not any(each.is_mended for each in self.done):
            return
        with suppress(MervCacheError):  # what could not be mended is in the list already
            writer = StoreWriter.open(path)
            erase_tombstoned(writer)
            writer.publish_snapshot(anew=True)

    def _note(self, repaired: Repaired) -> None:
        if repaired.key in self._settled and not repaired.is_mended:
            return
        if not repaired.is_mended or repaired.key.startswith((RECEIPTS, CANARIES)):  # the snapshot names others
            self._settled.add(repaired.key)
        self.done.append(repaired)
        self._say(repaired)

    def _is_document(self, key: str) -> bool:
        return (shard_place(key) is None and key not in self._settled and "/" in key) or key == ROOT_METADATA


def _damage(check: Verification) -> list[Finding]:
    return [finding for finding in check.findings.sorted() if finding.severity == "damage"]


def _order(key: str) -> tuple[int, int, str]:
    top = ROOT_METADATA if key.endswith(ROOT_METADATA) else key.split("/")[0]
    return (_ORDER.index(top) if top in _ORDER else len(_ORDER), key.count("/"), key)
