"""Spool: copies of remote tar shards under the dataset's root, made once.

Comes in: addresses with a scheme (https, s3, gs, ...). Goes out: address -> path under the root. Extraction reads clips
at offsets, many processes at once, so a shard must be local. The bytes that the folder may hold are stated by the user
and counted before anything is fetched; a copy that was interrupted goes on where it stopped, and only a whole copy has
the shard's name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mervcache.errors import RunStoppedError, UserError

FOLDER = "spool"
READ_BYTES = 1 << 22


def is_remote(name: str) -> bool:
    """True for an address with a scheme."""
    return "://" in name


@dataclass(frozen=True)
class _Shard:
    address: str
    copy: Path
    file_system: Any
    remote_path: str
    num_bytes: int


def spool_shards(addresses: Iterable[str], root: Path, limit_gb: float) -> dict[str, str]:
    """Copy the shards that are not there yet; address -> path relative to the root.

    Raises `UserError` if all copies together would take more than `limit_gb` (10^9 bytes), before the first is made.
    """
    addresses = list(addresses)
    if limit_gb <= 0:
        raise UserError(
            f"{addresses[0]} is remote: its shards are copied under {root / FOLDER} once; "
            "say how much room they may take with the option spool_gb=NUMBER"
        )
    names = {address: f"{FOLDER}/{_local_name(address)}" for address in addresses}
    absent = [_look_up(address, root / name) for address, name in names.items() if not (root / name).is_file()]
    present_bytes = sum((root / name).stat().st_size for name in names.values() if (root / name).is_file())
    total_bytes = present_bytes + sum(shard.num_bytes for shard in absent)
    if total_bytes > limit_gb * 1e9:
        raise UserError(
            f"the {len(names)} remote shards take {total_bytes / 1e9:.1f} GB, spool_gb allows {limit_gb:g}; "
            "raise it, or name fewer shards"
        )
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for shard in absent:
        _copy(shard)
    return names


def _local_name(address: str) -> str:
    """`HASH-NAME.tar`: shards of two places may share a name; what follows a "?" may be a token that changes."""
    parts = urlsplit(address)
    place = f"{parts.scheme}://{parts.netloc}{parts.path}"
    name = parts.path.rpartition("/")[2]
    if not name.endswith(".tar") or name == ".tar" or any(ord(c) < 32 or c in "\\%" for c in name):
        raise UserError(f"a remote shard must be called NAME.tar, got {address}")
    return f"{hashlib.sha256(place.encode()).hexdigest()[:8]}-{name}"


def _look_up(address: str, copy: Path) -> _Shard:
    import fsspec  # with the scheme's own library, only where something is remote

    try:
        file_system, remote_path = fsspec.core.url_to_fs(address)
        num_bytes = file_system.info(remote_path)["size"]
    except FileNotFoundError as error:
        raise UserError(f"remote shard {address} does not exist") from error
    except ImportError as error:
        raise UserError(f"remote shard {address}: {error}; pip install 'merv-pipeline[remote]' has most") from error
    except ValueError as error:
        raise UserError(f"remote shard {address} cannot be reached: {error}") from error
    except Exception as error:  # every scheme's library has errors of its own; the address names the item
        raise RunStoppedError(f"remote shard {address} cannot be reached: {error}") from error
    if not isinstance(num_bytes, int):
        raise UserError(f"remote shard {address} does not tell its size; copy it under the root yourself")
    return _Shard(address, copy, file_system, remote_path, num_bytes)


def _copy(shard: _Shard) -> None:
    """Fetch what is lacking into NAME.part, then give it its name; never more than the size that was counted."""
    part = shard.copy.with_name(shard.copy.name + ".part")
    try:
        with open(part, "ab") as target, shard.file_system.open(shard.remote_path, "rb") as source:
            done = target.tell()
            if done > shard.num_bytes:  # the shard has become another since
                target.truncate(0)
                done = 0
            source.seek(done)
            while done < shard.num_bytes and (data := source.read(min(READ_BYTES, shard.num_bytes - done))):
                target.write(data)
                done += len(data)
            target.flush()
            os.fsync(target.fileno())
    except Exception as error:  # as above; what has arrived stays for the next run
        raise RunStoppedError(f"remote shard {shard.address} stopped after {_size(part)} bytes: {error}") from error
    if done < shard.num_bytes:
        raise RunStoppedError(f"remote shard {shard.address} ended after {done} of {shard.num_bytes} bytes; run again")
    os.replace(part, shard.copy)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
