"""A program for the fault tests: brings a store up to a fixed plan, as often as it is run, until it is killed.

    python -m tests.featurestore.extract_loop STORE FIRST_BLOCK NOISE

Starts at FIRST_BLOCK and goes round, so that two of them work on the same blocks in different orders.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.featurestore.conftest import BASE, Kit, clips_by_row, fill_block, image, tiny_identity, video

IDENTITIES = [BASE, tiny_identity(encoder="vivit", storage_dtype="uint8", prefix_tokens=3, grid=(4, 4, 4), width=64)]
BROKEN = ("videos/5.mp4", "images/2.jpg")


def main(path: str, first: int, noise: int) -> None:
    kit = Kit(Path(path))
    writer = kit.writer()
    for stop in (10, 22):  # two batches: a dataset that grew
        writer.add_clips([*(video(n) for n in range(stop)), *(image(n) for n in range(stop // 2))])
        for kind in ("video", "image"):
            for identity in IDENTITIES:
                group = kit.group(identity, kind)
                blocks = group.missing_blocks()
                clips = clips_by_row(kit.writer())  # after them: another program may have given out more rows meanwhile
                for block in blocks[first:] + blocks[:first]:
                    fill_block(group.begin(block), clips[kind], identity, BROKEN, noise).commit()
        writer.publish_snapshot()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
