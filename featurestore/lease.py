"""A courtesy between drivers: who is working on this store just now.

Two drivers on one store are safe (puts are exclusive) but waste work, so a driver takes the lease and others are told.
The holder touches it, a file in a folder and an object in a bucket; a lease untouched for `stale_after_s`, or whose
process on this host is gone, is nobody's. Correctness never depends on it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from featurestore.layout import TEMPORARY
from featurestore.locate import Place, is_url, place_of
from featurestore.objects.base import machine_faults, put_if_absent
from mervcache.errors import MervCacheError, UserError

STALE_AFTER_S = 120.0
LEASE_NAME = "driver.lease"


class LeaseBackend(Protocol):
    """What a lease is written on."""

    def create(self, text: str) -> bool: ...  # False if there is one

    def read(self) -> str: ...  # FileNotFoundError if there is none

    def touch(self, text: str) -> None: ...

    def remove(self) -> None: ...

    def age_s(self) -> float | None: ...  # since it was touched, by one clock; None if there is none


class StoreLease:
    """`with StoreLease(path, run_id): ...` raises UserError if another driver is at work."""

    def __init__(self, path: Place, run_id: str, *, stale_after_s: float = STALE_AFTER_S) -> None:
        place = place_of(path)
        self._paper: LeaseBackend = _LeaseObject(str(place)) if is_url(place) else _LeaseFile(Path(place))
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": run_id, "since": time.time()}
        self._stale_after_s = stale_after_s
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> StoreLease:
        with machine_faults("take the store's lease"):
            while not self._try_create():
                self._refuse_if_fresh()
                with suppress(FileNotFoundError):
                    self._paper.remove()
        self._heart = threading.Thread(target=self._beat, name="store-lease", daemon=True)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._heart:
            self._heart.join()
        with suppress(OSError, MervCacheError):
            if self.holder() == self._owner:
                self._paper.remove()

    def holder(self) -> dict | None:
        """{"host", "pid", "run", "since" (Unix time)} of the lease, or None."""
        try:
            return json.loads(self._paper.read())
        except (OSError, ValueError):
            return None

    def _try_create(self) -> bool:
        return self._paper.create(json.dumps(self._owner))

    def _refuse_if_fresh(self) -> None:
        age_s, holder = self._paper.age_s(), self.holder() or {}
        if age_s is not None and age_s < self._stale_after_s and not self._is_dead(holder):
            raise UserError(
                f"another run works on this store: {holder.get('run')} on {holder.get('host')}, process "
                f"{holder.get('pid')}, last seen {age_s:.0f} s ago; wait for it, or for {self._stale_after_s:.0f} s "
                "after it was killed"
            )

    def _is_dead(self, holder: dict) -> bool:
        """True if the holder was a process of this host that is gone: the same command again need not wait."""
        if holder.get("host") != self._owner["host"] or not isinstance(holder.get("pid"), int) or holder["pid"] < 1:
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # alive, and somebody else's
        return False

    def _beat(self) -> None:
        while not self._stop.wait(self._stale_after_s / 4):
            with suppress(OSError, MervCacheError):  # a missed beat is harmless, see above
                self._paper.touch(json.dumps(self._owner))


class _LeaseFile:
    """A lease in a folder; its age is the file's, by the file system's own clock."""

    def __init__(self, store: Path) -> None:
        self._file = store / TEMPORARY / LEASE_NAME

    def create(self, text: str) -> bool:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(text)
        return True

    def read(self) -> str:
        return self._file.read_text()

    def touch(self, text: str) -> None:
        os.utime(self._file)

    def remove(self) -> None:
        self._file.unlink()

    def age_s(self) -> float | None:
        """The clocks of two hosts may differ by minutes: a probe is dated by the same clock."""
        probe = self._file.with_name(f"clock-{os.getpid()}-{threading.get_ident()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self._file.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            with suppress(OSError):
                probe.unlink()


class _LeaseObject:
    """A lease in a bucket; its age is the object's, by the server's clock."""

    def __init__(self, url: str) -> None:
        from featurestore.objects.remote import open_remote  # needs obstore, which a folder does not

        self._objects = open_remote(url)
        self._key = f"{TEMPORARY}/{LEASE_NAME}"

    def create(self, text: str) -> bool:
        return put_if_absent(self._objects, self._key, text.encode())

    def read(self) -> str:
        return self._objects.get(self._key).decode()

    def touch(self, text: str) -> None:
        """Put it anew, unless somebody took it over."""
        self._objects.compare_and_swap(self._key, text.encode(), text.encode())

    def remove(self) -> None:
        self._objects.delete(self._key)

    def age_s(self) -> float | None:
        probe = f"{TEMPORARY}/clock-{uuid.uuid4().hex}"
        self._objects.put_exclusive(probe, b"")
        try:
            return (self._objects.modified(probe) - self._objects.modified(self._key)).total_seconds()
        except FileNotFoundError:
            return None
        finally:
            self._objects.delete(probe)
