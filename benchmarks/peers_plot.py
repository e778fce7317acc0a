"""Bars of peers.py's figures, read as JSON from stdin. Run with the peers' interpreter, which has matplotlib."""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "peers"
from matplotlib import pyplot  # noqa: E402  after the choice of the backend

PANELS = {"uncompressed": "none", "usual codec": "default"}


def main() -> None:
    rows = json.load(sys.stdin)["rows"]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 4.5), layout="constrained")
    for axis, (title, codec) in zip(axes, PANELS.items(), strict=True):
        shown = {name: row for name, row in rows.items() if f"{codec} 1 warm" in row}
        for offset, (cores, state) in enumerate([(1, "cold"), (1, "warm"), (2, "cold"), (2, "warm")]):
            places = [n + 0.2 * offset for n in range(len(shown))]
            heights = [row.get(f"{codec} {cores} {state}", 0) for row in shown.values()]
            axis.barh(places, heights, 0.2, label=f"{cores} core{'s' * (cores > 1)}, {state}")
        axis.set_yticks([n + 0.3 for n in range(len(shown))], list(shown))
        axis.invert_yaxis()
        axis.set_title(f"{title}: MB/s of float16 tokens, digests checked")
    axes[0].legend()
    figure.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
