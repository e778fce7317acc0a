"""What lies about in a store: nothing depends on it, but somebody should know and can be told what to do."""

from __future__ import annotations

from collections.abc import Mapping

from featurestore.keep.findings import Findings
from featurestore.keep.verify_blocks import check_orphan
from featurestore.layout import CARD, LISTING, SNAPSHOTS, TEMPORARY, shard_place
from featurestore.metadata import ArraySpec
from featurestore.places.objects import Objects

Specs = Mapping[tuple[str, str], Mapping[str, ArraySpec]]  # (kind, group) -> its arrays
_BESIDE = (CARD, LISTING)  # for people and web servers; made anew by every push


def find_strays(findings: Findings, objects: Objects, specs: Specs, *, is_full: bool) -> None:
    """Temporary files of runs that were killed, shards without a receipt, and names that no store has."""
    for name in objects.abandoned():
        if objects.list_names(f"{TEMPORARY}/{name}"):
            findings.stray(
                f"{TEMPORARY}/{name}", "was left by an interrupted run", "the next extract sweeps it; or delete it"
            )
    for key in objects.strange() if hasattr(objects, "strange") else ():
        findings.found(key, "is a link or device; a store holds plain files", "put the file in its place, or delete it")
    for key in sorted(objects.list_tree()):
        if key in findings.looked_at or key in _BESIDE or key.split("/")[0] == TEMPORARY:
            continue
        if place := shard_place(key):
            kind, group, array, _ = place
            findings.stray(
                key,
                "is a shard without a receipt: a block in the making, or left by a killed worker",
                "run the same extract again: it makes the block's receipt",
            )
            if is_full:
                check_orphan(findings, objects, key, specs.get((kind, group), {}).get(array))
        elif key.startswith(f"{SNAPSHOTS}/") and key.endswith(".parquet"):
            findings.stray(key, "is the table of a snapshot that was never finished", "delete it")
        else:
            findings.stray(key, "is no file of a feature store", "delete it, or keep it elsewhere")
