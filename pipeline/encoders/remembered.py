"""Remembered digests: what weights hash to, so that who only needs their name need not load them.

Comes in: an encoder's spec and its weights argument. Goes out: the sha256 that loading them gave before, on this
machine and for this user. It is found by a fingerprint of where the weights come from: a folder's files by path, size
and times, seeded ones by their seed, both with the architecture and the versions of what loads them. It is a shortcut
and never the truth: whoever computes loads, and the digest of what was loaded replaces a remembered one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import uuid
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mervcache.errors import UserError
from mervcache.files import record_digest, user_cache
from pipeline.encoders.base import EncoderSpec
from pipeline.encoders.weights import parse_weights

LOADER_VERSION = 1  # counts changes of what is hashed: `weights.py`, `network.py` and the families
_LIBRARIES = ("merv-pipeline", "torch", "transformers", "numpy")


def memory_folder() -> Path:
    """Where digests are kept: one small file each, under the user's cache folder."""
    return user_cache() / "merv-pipeline" / "weights"


def fingerprint(spec: EncoderSpec, weights: str) -> str | None:
    """Names what loading would read, without reading it; None where that is not on this machine."""
    try:
        source = parse_weights(weights)
    except UserError:
        return None  # a folder that only workers see
    if source.kind == "random":
        origin: Any = {"seed": source.seed}
    else:
        folder = source.folder if source.kind == "folder" else _hub_folder(spec.hub_id)
        origin = folder and _files(folder)
    if not origin:
        return None
    network = [spec.model, dict(spec.architecture), spec.temporal_reach, spec.prefix_tokens, spec.skipped_blocks]
    loader = [LOADER_VERSION, spec.builder, _builder_file(spec.builder), _versions()]
    return record_digest({"weights": origin, "network": [*network, spec.final_norm], "loader": loader})


def remembered_sha256(mark: str | None) -> str | None:
    """The digest that loading gave under this fingerprint; None if nobody remembers."""
    try:
        record = json.loads((memory_folder() / f"{mark}.json").read_text()) if mark else {}
    except (OSError, ValueError):
        return None
    found = record.get("sha256") if isinstance(record, dict) else None
    return found if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{64}", found) else None


def remember(mark: str | None, sha256: str) -> bool:
    """Keep what loading gave; True if another digest was remembered and is replaced."""
    if mark is None or (before := remembered_sha256(mark)) == sha256:
        return False
    folder = memory_folder()
    temporary = folder / f"{mark}.{uuid.uuid4().hex}.tmp"
    with suppress(OSError):  # a home that may not be written to costs time, nothing else
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"sha256": sha256}))
        os.replace(temporary, folder / f"{mark}.json")
    return before is not None


def _hub_folder(hub_id: str) -> Path | None:
    """The folder of the Hub's cache that would be read; nothing is asked of the network."""
    from huggingface_hub import try_to_load_from_cache  # a third of a second

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _files(folder: Path) -> list[list[Any]] | None:
    """Path, size and times of every file of a checkpoint; the change time tells one put in another's place."""
    try:
        with os.scandir(folder) as entries:
            found = [(os.path.realpath(entry), entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except OSError:
        return None
    return sorted([real, name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for real, name, s in found)


def _builder_file(builder: str) -> list[Any] | None:
    """Size and time of the module that builds the network: a plug-in may change without a new version."""
    try:
        found = importlib.util.find_spec(builder.partition(":")[0])
        status = os.stat(found.origin) if found and found.origin else None
    except (ImportError, ValueError, OSError):
        return None
    return status and [status.st_size, status.st_mtime_ns]


@cache
def _versions() -> list[str]:
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return found
