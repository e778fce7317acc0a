"""Release a version: changelog section, version, commit, tag, wheel and site.

    python scripts/release.py 0.2.0 --dry-run    # prints the section and stops
    python scripts/release.py 0.2.0

Nothing is pushed or uploaded.
"""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
HEADING = "## Unreleased\n"
VERSION_LINE = re.compile(r'^version = "(\d+\.\d+\.\d+)"$', re.MULTILINE)


class ReleaseError(click.ClickException):
    """A release that cannot be made."""


def released_changelog(text: str, version: str, date: str) -> tuple[str, str]:
    """(changelog with `Unreleased` as this version and a new empty one, the section's content)."""
    before, found, after = text.partition(HEADING)
    if not found:
        raise ReleaseError(f"CHANGELOG.md has no line {HEADING.strip()!r}")
    section, _, older = after.partition("\n## ")
    if not re.search(r"^- ", section, re.MULTILINE):
        raise ReleaseError("the section Unreleased of CHANGELOG.md is empty: there is nothing to release")
    older = f"\n## {older}" if older else ""
    return f"{before}{HEADING}\n## {version} - {date}\n{section.rstrip()}\n{older}", section.strip()


def released_project(text: str, version: str) -> str:
    """pyproject.toml with this version, which must not be older than its own."""
    match = VERSION_LINE.search(text)
    if not match:
        raise ReleaseError('pyproject.toml has no line version = "X.Y.Z"')
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ReleaseError(f"a version is X.Y.Z, got {version!r}")
    if _numbers(version) < _numbers(match[1]):
        raise ReleaseError(f"version {version} is older than {match[1]} of pyproject.toml")
    return text[: match.start(1)] + version + text[match.end(1) :]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def run(*command: str) -> str:
    """Standard output of a command in the checkout; `ReleaseError` if it fails."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ReleaseError(f"{' '.join(command)} failed with exit code {done.returncode}")
    return done.stdout.strip()


@click.command()
@click.argument("version")
@click.option("--dry-run", is_flag=True, help="Print the section of the changelog; change nothing.")
def main(version: str, dry_run: bool) -> None:
    """Release VERSION (X.Y.Z): changelog, commit, tag, wheel and site."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    changelog, project = ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"
    new_changelog, section = released_changelog(changelog.read_text(), version, date)
    new_project = released_project(project.read_text(), version)
    if run("git", "status", "--porcelain"):
        raise ReleaseError("the checkout has changes: commit them first")
    tag = f"v{version}"
    if run("git", "tag", "--list", tag):
        raise ReleaseError(f"the tag {tag} exists: a version is released once")
    if dry_run:
        click.echo(f"{tag}, {date}\n\n{section}")
        return
    changelog.write_text(new_changelog)
    project.write_text(new_project)
    run("git", "commit", "--all", "--quiet", "--message", f"Release {version}")
    run("git", "tag", "--annotate", "--cleanup=verbatim", tag, "--message", f"{version}\n\n{section}")
    run("make", "wheel", "docs")
    click.echo(f"{tag}: see dist/ and build/site. Next: scripts/check_wheel.sh dist/*-{version}-*.whl, then by hand:")
    click.echo(f"  git push origin HEAD {tag}    and upload dist/")


if __name__ == "__main__":
    sys.exit(main())
