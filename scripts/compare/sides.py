"""The two commits that are compared: each has a checkout, an environment and a work folder of its own.

An environment is a venv that sees this interpreter's third-party packages through a .pth file and has the checkout
installed. While a side runs, its work folder has the name `work`: absolute paths are equal on both sides.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
OLD_WORDS = {  # an option's name now -> before it was renamed
    "--baseline": "--beside",
    "--skip-media-check": "--trust-media",
    "--all-copies": "--everywhere",
    "--exact-ids": "--only-these",
}
DROPPED = ("PYTHON", "VIRTUAL_ENV", "AWS_", "HF_", "HUGGING", "TINY_", "ACCELERATE_")  # of the caller's environment
NO_PACKAGES = ("tests", "benchmarks", "scripts")
LOCATE = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""


class CommandError(Exception):
    """A command that ended as it should not."""


@dataclass(frozen=True)
class Side:
    """One commit: its checkout, its environment, and the folder that its commands are started in."""

    name: str
    root: Path
    folder: Path  # of environment, work and log
    work: Path  # where the work folder is while this side is active
    environment: dict[str, str] = field(default_factory=dict, hash=False)  # added to every command's

    @property
    def binaries(self) -> Path:
        return self.folder / "venv" / "bin"

    def command(self, *words: str | Path) -> list[str]:
        """The command line in this side's own words, with its own executable."""
        program, *rest = map(str, words)
        if program != "python" and any(word in OLD_WORDS for word in rest):
            known = _help(self, (program, rest[0]) if program != "merv-train" else (program,))
            rest = [word if word in known else OLD_WORDS.get(word, word) for word in rest]
        return [str(self.binaries / program), *rest]

    def variables(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
        fixed = {
            "PATH": f"{self.binaries}{os.pathsep}{kept.get('PATH', os.defpath)}",
            "XDG_CACHE_HOME": str(self.work / "cache"),
            "HF_HOME": str(self.work / "cache" / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "120",
        }
        return kept | fixed | self.environment

    def run(self, *words: str | Path, codes: Sequence[int] = (0,)) -> str:
        """Run a command in the work folder; returns what it printed, raises on another exit code than these."""
        command = self.command(*words)
        done = subprocess.run(
            command, cwd=self.work, env=self.variables(), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        with open(self.folder / "log.txt", "a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}exit code {done.returncode}\n\n")
        if done.returncode not in codes:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
            raise CommandError(f"{self.name}: {' '.join(map(str, words))} ended with {done.returncode}:\n{tail}")
        return done.stdout

    def start(self, *words: str | Path) -> subprocess.Popen:
        """Start a command in a process group of its own."""
        log = open(self.folder / "log.txt", "a")  # noqa: SIM115  the process keeps it
        return subprocess.Popen(
            self.command(*words),
            cwd=self.work,
            env=self.variables(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Give this side's work folder the name that both sides know."""
        kept = self.folder / "work"
        kept.rename(self.work)
        try:
            yield
        finally:
            self.work.rename(kept)

    def packages(self) -> list[str]:
        """The top-level packages of the checkout."""
        return sorted(
            path.parent.name for path in self.root.glob("*/__init__.py") if path.parent.name not in NO_PACKAGES
        )

    def check(self) -> None:
        """Raise unless every top-level package is imported from this side's checkout."""
        with self.active():
            found = json.loads(self.run("python", "-c", LOCATE, *self.packages()))
        for package, file in found.items():
            if not Path(file).resolve().is_relative_to(self.root.resolve()):
                raise CommandError(f"{self.name}: {package} is imported from {file}, which is not under {self.root}")


@cache
def _help(side: Side, words: tuple[str, ...]) -> frozenset[str]:
    """The words of a command's help, options among them."""
    return frozenset(re.split(r"[^\w-]+", side.run(*words, "--help")))


def make_side(name: str, root: Path, folder: Path) -> Side:
    """Install a checkout in an environment of its own, and prove that it is what runs."""
    side = Side(name=name, root=root, folder=folder / name, work=folder / "work")
    (side.folder / "work").mkdir(parents=True)
    venv.create(side.folder / "venv", with_pip=False, symlinks=True)
    (own,) = (side.folder / "venv").glob("lib/python*/site-packages")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    shared = [path for path in sys.path if path in paths or path.endswith(("site-packages", "dist-packages"))]
    (own / "shared.pth").write_text("\n".join(dict.fromkeys(shared)) + "\n")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", "--editable"]
    with side.active():
        side.run("python", "-m", "pip", *install, root)
    side.check()
    return side


@contextmanager
def checkout(revision: str | None, folder: Path, name: str) -> Iterator[Path]:
    """A worktree of a revision; None: this checkout as it is."""
    if revision is None:
        yield REPOSITORY
        return
    place = folder / f"{name}-checkout"
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), revision], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=False)


@contextmanager
def two_sides(base: str, head: str | None, folder: Path) -> Iterator[tuple[Side, Side]]:
    """Both commits, ready to run; the worktrees are removed also after a SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with checkout(base, folder, "base") as base_root, checkout(head, folder, "current") as root:
        yield make_side("base", base_root, folder), make_side("current", root, folder)


def link_tree(source: Path, out: Path) -> None:
    """A copy of a folder, by hard links where the file system can."""

    def place(file: str, target: str) -> None:
        with suppress(OSError):
            os.link(file, target)
            return
        shutil.copy2(file, target)

    shutil.copytree(source, out, copy_function=place)
