"""Advisory lock so that two drivers do not duplicate work on one store.

Correctness never depends on it: puts are exclusive. The holder touches `tmp/driver.lease`, a file or an object, every
30 s; a lease expires after 120 s without a touch, or when its process on this host has exited.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress

from featurestore.layout import TEMPORARY
from featurestore.locate import Place
from featurestore.objects.base import machine_faults, put_if_absent
from featurestore.objects.open import open_objects
from mervcache.errors import MervCacheError, UserError

STALE_AFTER_S = 120.0
LEASE_KEY = f"{TEMPORARY}/driver.lease"


class StoreLease:
    """`with StoreLease(path, run_id): ...` raises UserError if another driver is at work."""

    def __init__(self, path: Place, run_id: str, *, stale_after_s: float = STALE_AFTER_S) -> None:
        self._objects = open_objects(path)
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": run_id, "since": time.time()}
        self._stale_after_s = stale_after_s
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def __enter__(self) -> StoreLease:
        with machine_faults("take the store's lease"):
            while not put_if_absent(self._objects, LEASE_KEY, json.dumps(self._owner).encode()):
                age_s, holder = self._age_s(), self.holder() or {}
                if age_s is not None and age_s < self._stale_after_s and not self._has_exited(holder):
                    raise UserError(
                        f"another run works on this store: {holder.get('run')} on {holder.get('host')}, process "
                        f"{holder.get('pid')}, last seen {age_s:.0f} s ago; wait for it, or for "
                        f"{self._stale_after_s:.0f} s after it was killed"
                    )
                self._objects.delete(LEASE_KEY)
        self._heartbeat = threading.Thread(target=self._touch_until_stopped, name="store-lease", daemon=True)
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._heartbeat:
            self._heartbeat.join()
        with suppress(OSError, MervCacheError):
            if self.holder() == self._owner:
                self._objects.delete(LEASE_KEY)

    def holder(self) -> dict | None:
        """{"host", "pid", "run", "since" (Unix time)} of the lease, or None."""
        try:
            return json.loads(self._objects.get(LEASE_KEY))
        except (OSError, ValueError, MervCacheError):
            return None

    def _age_s(self) -> float | None:
        """Seconds since the last touch, None without a lease; a probe gives the time, as clocks of hosts differ."""
        probe = f"{TEMPORARY}/clock-{uuid.uuid4().hex}"
        self._objects.put_exclusive(probe, b"")
        try:
            return self._objects.modified_s(probe) - self._objects.modified_s(LEASE_KEY)
        except FileNotFoundError:
            return None
        finally:
            self._objects.delete(probe)

    def _has_exited(self, holder: dict) -> bool:
        """True if the holder was a process of this host that has exited: no need to wait then."""
        if holder.get("host") != self._owner["host"] or not isinstance(holder.get("pid"), int) or holder["pid"] < 1:
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # alive, of another user
        return False

    def _touch_until_stopped(self) -> None:
        text = json.dumps(self._owner).encode()
        while not self._stop.wait(self._stale_after_s / 4):
            with suppress(OSError, MervCacheError):  # a missed touch is harmless
                self._objects.compare_and_swap(LEASE_KEY, text, text)  # unless another driver took it over
