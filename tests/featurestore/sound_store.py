"""A small store with every kind of file that a store can hold, some of them newer than its newest snapshot."""

from __future__ import annotations

from pathlib import Path

from featurestore.clips import Sample, Turn
from featurestore.maintenance.tombstone import tombstone
from tests.featurestore.conftest import BASE, Kit, clips_by_row, fill_block, image, tiny_identity, video

TURNS = (Turn(role="human", text="what?"), Turn(role="gpt", text="that"))
SMALL = {"architecture": {"class": "Tiny"}, "grid": (2, 1, 2), "width": 4}
VIVIT = tiny_identity(encoder="vivit", storage_dtype="uint8", prefix_tokens=2, **SMALL)
SIGLIP = tiny_identity(encoder="siglip", storage_dtype="bfloat16", **SMALL)


def sample(number: int, clip=None) -> Sample:
    clip_id = clip.clip_id if clip else None
    return Sample(sample_id=str(number), clip_id=clip_id, turns=TURNS, stage="align", source="x")


def build(path: Path) -> Kit:
    """Both kinds, every array and dtype, failures, a retry, versions of samples, journals, a removal, snapshots."""
    kit = Kit(path)
    writer = kit.writer()
    writer.add_clips([*(video(n) for n in range(6)), *(image(n) for n in range(2))])
    writer.add_samples("mix", [sample(1, video(0)), sample(2, image(1))])
    kit.fill(broken=("videos/1.mp4",))
    writer.add_clips([video(1)], retry=True)
    writer.add_samples("other", [sample(3)])
    kit.fill(VIVIT)
    kit.fill(SIGLIP, codec="none")
    kit.fill()
    for identity in (BASE, VIVIT):
        kit.add_reference_clips(identity)
    writer.journal("run-1-driver", {"host": "h", "seconds": 1.5})
    tombstone(path, [video(3).clip_id, image(1).clip_id], reason="the licence was withdrawn", date="2026-11-20")
    return kit


def add_unpublished(kit: Kit) -> None:
    """What a run that is at work, or was killed, leaves: no snapshot names any of it."""
    writer = kit.writer()
    writer.add_clips([video(n) for n in range(20, 24)])
    writer.add_samples("mix", [sample(2, image(0)), sample(9)])
    writer.add_samples("late", [sample(11, video(21))])
    writer.grow_groups()
    rows = clips_by_row(writer)["video"]
    group = kit.group(BASE)
    for block in group.missing_blocks():
        fill_block(group.begin(block), rows, BASE).commit()
    orphan = kit.group(VIVIT)
    receipt = fill_block(orphan.begin(block), rows, VIVIT).commit()
    (kit.path / "receipts" / "video" / orphan.name / f"{receipt.block:08d}.json").unlink()
