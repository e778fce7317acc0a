"""Show that two commits do the same: the same work through the command lines of both, results compared byte by byte.

    python scripts/compare_commits.py --base REV [--only NAME ...] [--json]

Left out are times, hosts, run ids and versions: journals, scratch folders, and the values named in `VOLATILE`. The exit
code is 1 if anything differs. What a case does is in compare/cases.py.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from compare.cases import CASES, PRINTED, Bench
from compare.sides import REPOSITORY, CommandError, Side, two_sides
from compare.stand_ins import free_port

ASIDE = ("journal", "tmp")  # folders of a store that hold no result
VOLATILE = re.compile(r"(.*_per_s|.*_s|.*_share|seconds|predicted|run|last run|made|software|halvings)$")
SHOWN = 8  # differing files that are named


def content(path: Path) -> bytes:
    """What is compared of a file: its bytes, of records with times only the rest."""
    if path.name == "metrics.jsonl":  # a run that went on has some steps twice
        rows = [stable(json.loads(line)) for line in path.read_text().splitlines()]
        return json.dumps(list({(row.get("step"), *sorted(row)): row for row in rows}.values())).encode()
    if path.suffix == ".json" and (path.name == "run.json" or path.parent.name == PRINTED):
        return json.dumps(stable(json.loads(path.read_text()))).encode()
    return path.read_bytes()


def stable(value: Any) -> Any:
    """A JSON value without what differs between two runs of the same code."""
    if isinstance(value, dict):
        return {key: stable(inner) for key, inner in value.items() if not VOLATILE.fullmatch(key)}
    return [stable(inner) for inner in value] if isinstance(value, list) else value


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file that is a result."""
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in files}
    kept = {path: name for path, name in names.items() if not set(ASIDE) & set(name.parts)}
    return {name.as_posix(): hashlib.sha256(content(path)).hexdigest() for path, name in kept.items()}


def compare_folders(base: Path, current: Path, accepted: Iterable[str]) -> dict[str, Any]:
    """How many files there are, and which differ or are on one side only."""
    before, after = digests(base), digests(current)
    names = sorted(before.keys() | after.keys())
    differing = [name for name in names if before.get(name) != after.get(name)]
    waived = [name for name in differing if any(fnmatch.fnmatch(name, pattern) for pattern in accepted)]
    return {
        "files": len(names),
        "differ": [name for name in differing if name not in waived],
        "accepted": waived,
        "only base": sorted(before.keys() - after.keys()),
        "only current": sorted(after.keys() - before.keys()),
    }


def run_case(name: str, sides: tuple[Side, Side], benches: dict[str, Bench], accepted: Iterable[str]) -> Iterator[dict]:
    """Run a case on both sides; one row per folder that it leaves."""
    for side in sides:
        try:
            with side.active():
                benches[side.name].run_case(name)
        except (CommandError, OSError) as error:
            yield {"case": name, "result": "", "error": f"{type(error).__name__}: {error}"}
            return
    base, current = (side.folder / "work" / name for side in sides)
    for result in sorted({path.name for folder in (base, current) for path in folder.iterdir()}):
        row = compare_folders(base / result, current / result, accepted)
        yield {"case": name, "result": result, **row}


def line(row: dict[str, Any]) -> str:
    name = f"{row['case']}/{row['result']}"
    if "error" in row:
        return f"{name:42} FAILED\n    " + row["error"].replace("\n", "\n    ")
    verdict = (
        f"{len(row['differ'])} of {row['files']} files differ" if row["differ"] else f"equal, {row['files']} files"
    )
    if row["accepted"]:
        verdict += f", {len(row['accepted'])} differences accepted"
    shown = row["differ"][:SHOWN]
    lines = [f"    {_where(row, file)}{file}" for file in shown]
    more = len(row["differ"]) - len(shown)
    return "\n".join([f"{name:42} {verdict}", *lines, *([f"    and {more} more"] if more else [])])


def _where(row: dict[str, Any], file: str) -> str:
    return next((f"{where}: " for where in ("only base", "only current") if file in row[where]), "")


def is_equal(row: dict[str, Any]) -> bool:
    return "error" not in row and not row["differ"]


@click.command()
@click.option("--base", required=True, help="The commit to compare with.")
@click.option("--head", show_default="this checkout as it is", help="Compare this commit instead of the checkout.")
@click.option("--only", multiple=True, type=click.Choice(list(CASES)), help="Only this case. Repeatable.")
@click.option(
    "--media-root",
    type=click.Path(path_type=Path),
    default=REPOSITORY.parent / "shared" / "videollava_mini",
    help="A small dataset in the layout of Video-LLaVA.",
)
@click.option("--accept", multiple=True, metavar="GLOB", help="Files that may differ, such as README.md. Repeatable.")
@click.option("--keep", type=click.Path(path_type=Path), help="Work in this new folder and leave it there.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparisons as JSON.")
def main(
    base: str,
    head: str | None,
    only: tuple[str, ...],
    media_root: Path,
    accept: tuple[str, ...],
    keep: Path | None,
    as_json: bool,
) -> None:
    """Compare what two commits write and print."""
    if keep:
        keep.mkdir(parents=True)
    folder = keep.resolve() if keep else Path(tempfile.mkdtemp(prefix="compare-"))
    ports = {"s3": free_port(), "hub": free_port()}
    rows = []
    try:
        with two_sides(base, head, folder) as sides:
            media = folder / "media"
            benches = {side.name: Bench(side, media_root.resolve(), media, ports) for side in sides}
            for name in only or CASES:
                began = time.monotonic()
                for row in run_case(name, sides, benches, accept):
                    rows.append(row)
                    if not as_json:
                        click.echo(line(row))
                click.echo(f"{name} took {time.monotonic() - began:.0f} s", err=True)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    wrong = [row for row in rows if not is_equal(row)]
    if as_json:
        click.echo(json.dumps({"base": base, "comparisons": rows, "equal": not wrong}, indent=2))
    else:
        click.echo(f"{len(rows)} comparisons, {len(rows) - len(wrong)} equal")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
