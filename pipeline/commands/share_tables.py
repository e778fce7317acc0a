"""What moving and joining stores did, for a person, on stdout."""

from __future__ import annotations

from featurestore.transfer.merge import Combined
from featurestore.transfer.sync import Transferred
from mervcache.console import console, strong
from pipeline.commands.tables import counted, plural, size


def transferred(done: Transferred) -> None:
    """What a push or pull did."""
    out = console()
    out.print(
        strong(done.destination), f"  snapshot {done.snapshot}, {', '.join(done.encoders) or 'no encoders'}", sep=""
    )
    out.print(
        f"{plural(done.sent_blocks, 'block')} of {done.blocks} moved, {size(done.sent_bytes)} of {size(done.bytes)}; "
        "the rest was there"
    )
    if done.card is False:
        out.print("no card was written: the README.md there is somebody's own")
    if done.overhead > 1:
        out.print(
            f"whole blocks hold {done.overhead:.2f} times the clips asked for: `merv-pipeline subset` cuts them out"
        )


def combined(done: Combined) -> None:
    """What a union, subset or import laid out."""
    out = console()
    out.print(strong(done.store), f"  snapshot {done.snapshot}", sep="")
    out.print(f"{done.clips} clips, {done.cells} cells (clip and encoder), {done.copied} of them copied in this run")
    if done.shared:
        out.print(
            f"{done.shared} cells are in several stores, {done.differing} with other bits: the first store's stand"
        )
    if done.renamed:
        out.print(f"{done.renamed} cells were taken from the same media under another name")
    if done.other_media:
        out.print(
            f"{done.other_media} cells were left aside: a later store has other media under the name of a clip; rename "
            "it there, or give that store first"
        )
    if done.removed:
        out.print(f"{plural(done.removed, 'clip')} left out: removed by tombstones, which the new store has as well")
    counted("samples", "count", done.samples)
