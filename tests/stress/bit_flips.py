"""Flip bits of a store and count what `verify --full` finds; then let `repair` mend some, one at a time.

    python -m tests.stress.bit_flips [--flips 5000] [--seed 0] [--repairs 200]

The store is small and has every kind of file, some newer than its newest snapshot. Flips are spread over all files
evenly, at random bits, in sets of files that do not vouch for one another. A flip counts as found if the verification
names its file as damaged; printed are findings and misses by kind of file. After every flip that is repaired, all bytes
of the store must be what they were before: those of shards and zarr.json without another copy, all others with one.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from featurestore.maintenance.findings import is_damaged
from featurestore.maintenance.repair import repair_store
from featurestore.maintenance.verify import verify_store
from tests.featurestore.sound_store import add_unpublished, build


@click.command()
@click.option("--flips", type=click.IntRange(1), default=5000, show_default=True, help="Bits to flip.")
@click.option("--seed", default=0, show_default=True, help="Of the random bits.")
@click.option("--repairs", type=click.IntRange(0), default=200, show_default=True, help="Flips to mend as well.")
def main(flips: int, seed: int, repairs: int) -> None:
    """Flip bits of a store and count those that a full verification misses."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="bit-flips-") as folder:
        store = Path(folder) / "store.zarr"
        kit = build(store)
        published = files_of(store)
        add_unpublished(kit)
        missed = flip_bits(store, flips, rng)
        copy = shutil.copytree(store, Path(folder) / "copy.zarr")
        failed = repair_some(store, copy, repairs, rng, published) if repairs else 0
    sys.exit(1 if missed or failed else 0)


def files_of(store: Path) -> list[Path]:
    """Every file but locks and leases."""
    return sorted(file for file in store.rglob("*") if file.is_file() and file.relative_to(store).parts[0] != "tmp")


def kind_of(store: Path, file: Path) -> str:
    parts = file.relative_to(store).parts
    if "c" in parts:
        return f"shard of {parts[2]}"
    if file.name == "zarr.json":
        return ("root", "kind", "group", "array")[len(parts) - 1] + " zarr.json"
    return f"{parts[0]} {file.suffix}"


def levels_of(store: Path) -> list[list[Path]]:
    """Files in sets that may be damaged together: none of a set is what another one is checked by."""
    levels: dict[str, list[Path]] = {}
    for file in files_of(store):
        kind = kind_of(store, file)
        levels.setdefault("shard" if kind.startswith("shard") else kind, []).append(file)
    return list(levels.values())


def flip_bits(store: Path, flips: int, rng: random.Random) -> int:
    """One bit in every file of a set, one verification: each of the files must be named."""
    before = verify_store(store, "full", workers=1)
    assert not is_damaged(before), before
    found: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    began, levels, number = time.monotonic(), levels_of(store), 0
    while found.total() + missed.total() < flips:
        files = levels[number % len(levels)]
        number += 1
        originals = {file: file.read_bytes() for file in files}
        bits = {file: (rng.randrange(len(data)), rng.randrange(8)) for file, data in originals.items()}
        for file, data in originals.items():
            file.write_bytes(flipped(data, *bits[file]))
        now = [finding for finding in verify_store(store, "full", workers=1) if finding.severity == "damage"]
        for file, data in originals.items():
            is_found = file.relative_to(store).as_posix() in {finding.key for finding in now}
            (found if is_found else missed)[kind_of(store, file)] += 1
            if not is_found:
                click.echo(f"MISSED: bit {bits[file][1]} of byte {bits[file][0]} of {file.relative_to(store)}")
            file.write_bytes(data)
    seconds = time.monotonic() - began
    total = found.total() + missed.total()
    click.echo(f"{total} flips over {sum(map(len, levels))} files in {seconds:.0f} s: {missed.total()} missed")
    for kind in sorted(found | missed):
        click.echo(f"  {kind:24} {found[kind]:6} found {missed[kind]:4} missed")
    return missed.total()


def repair_some(store: Path, copy: Path, repairs: int, rng: random.Random, published: list[Path]) -> int:
    """Repair flips, with another copy where a file has no crc32c; returns how many left other bytes than before."""
    counts: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for number in range(repairs):
        file = published[number % len(published)]
        before = {other: other.read_bytes() for other in files_of(store)}
        data = before[file]
        file.write_bytes(flipped(data, rng.randrange(len(data)), rng.randrange(8)))
        needs_copy = "shard" not in (kind := kind_of(store, file)) and "zarr.json" not in kind
        done = repair_store(store, other=copy if needs_copy else None)
        after = {other: other.read_bytes() for other in files_of(store)}
        same = all(after.get(other) == data for other, data in before.items())
        counts["mended to the byte" if same else "left other bytes"] += 1
        if not same:
            words[f"{kind}: {done[0].done if done else 'nothing done'}"] += 1
            shutil.rmtree(store)
            for other, data in before.items():
                other.parent.mkdir(parents=True, exist_ok=True)
                other.write_bytes(data)
        else:
            for other in set(after) - set(before):
                other.unlink()
    click.echo(f"{repairs} flips repaired: {dict(counts)}")
    for text, count in words.most_common():
        click.echo(f"  {count:4} {text}")
    return words.total()


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


if __name__ == "__main__":
    main()
