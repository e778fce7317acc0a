"""Write the kept corpus: small files that a stranger could give us, each with the error that refuses it and the reason.

    python -m tests.featurestore.hostile_corpus.make_corpus

Files stay as they were written (another version of the Parquet library would write others); `cases.json` lists them for
`test_hostile_corpus.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.featurestore.hostile_corpus import binary_cases, json_cases

FOLDER = Path(__file__).parent
SOURCES = (
    *(json_cases.roots, json_cases.groups, json_cases.receipts, json_cases.snapshots, json_cases.others),
    *(binary_cases.tables, binary_cases.conversations, binary_cases.shards),
)


def main() -> None:
    """Put every case anew."""
    listed = []
    for old in FOLDER.glob("*.case"):
        old.unlink()
    for source in SOURCES:
        for name, data, reader, expected, why in source():
            stem, _, snapshot_id = name.partition("@")
            (FOLDER / f"{stem}.case").write_bytes(data)
            error, _, words = expected.partition(": ")
            entry = {"file": f"{stem}.case", "reader": reader, "error": error, "words": words, "why": why}
            listed.append(entry | ({"id": snapshot_id} if snapshot_id else {}))
    (FOLDER / "cases.json").write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    main()
