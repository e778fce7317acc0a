"""Advisory lock so that two drivers do not duplicate work on one store.

Correctness never depends on it: puts are exclusive. The holder touches `tmp/driver.lease`, a file or an object, every
30 s; a lease expires after 120 s without a touch, or when its process on this host has exited. The lease of another
host may be that of a killed run, as of a job that was requeued elsewhere: whether it is touched again decides.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from featurestore.layout import TEMPORARY
from featurestore.locate import Place
from featurestore.objects.base import machine_faults, put_if_absent
from featurestore.objects.open import open_objects
from mervcache.errors import MervCacheError, UserError
from mervcache.files import is_json_object

STALE_AFTER_S = 120.0
POLL_S = 5.0  # between two looks at another host's lease
LEASE_KEY = f"{TEMPORARY}/driver.lease"

log = logging.getLogger(__name__)


class StoreLease:
    """`with StoreLease(path, run_id): ...` raises UserError if another driver is at work.

    Where that cannot be known at once it waits, for `stale_after_s` at most.
    """

    def __init__(self, path: Place, run_id: str, *, stale_after_s: float = STALE_AFTER_S) -> None:
        self._objects = open_objects(path)
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": run_id, "since": time.time()}
        self._stale_after_s = stale_after_s
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def __enter__(self) -> StoreLease:
        with machine_faults("take the store's lease"):
            while not put_if_absent(self._objects, LEASE_KEY, json.dumps(self._owner).encode()):
                self._wait_until_expired()
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

    def _wait_until_expired(self) -> None:
        """Wait until the lease of another driver has expired; UserError if that driver is at work."""
        first = None  # time of the holder's last touch, when it was first seen
        while (holder := self._read()) is not None and not self._has_exited(holder):
            touched_s, age_s = self._touched()
            if age_s is None or age_s >= self._stale_after_s:
                return
            who = f"{holder.get('run')} on {holder.get('host')}, process {holder.get('pid')}"
            if holder.get("host") == self._owner["host"] or first not in (None, touched_s):
                raise UserError(
                    f"another run works on this store: {who}, last seen {age_s:.0f} s ago; wait for it, or for "
                    f"{self._stale_after_s:.0f} s after it was killed"
                )
            if first is None:
                log.info(
                    "the store's lease is that of %s, last seen %.0f s ago; waiting up to %.0f s to see whether it "
                    "still works",
                    who,
                    age_s,
                    self._stale_after_s - age_s,
                )
            first = touched_s
            time.sleep(min(POLL_S, self._stale_after_s / 8))

    def holder(self) -> dict[str, Any] | None:
        """{"host", "pid", "run", "since" (Unix time)} of the lease, or None."""
        try:
            return self._read()
        except (OSError, MervCacheError):
            return None

    def _read(self) -> dict[str, Any] | None:
        """The holder; None without a lease, and for one that is not whole.

        Leases are put whole: a file without its content, as a power cut may leave, is no lease.
        """
        try:
            holder = json.loads(self._objects.get(LEASE_KEY))
        except (FileNotFoundError, ValueError):
            return None
        return holder if is_json_object(holder) else None

    def _touched(self) -> tuple[float, float | None]:
        """(time of the last touch, seconds since then or None without a lease), by the clock of the store's place."""
        probe = f"{TEMPORARY}/clock-{uuid.uuid4().hex}"  # clocks of hosts differ
        self._objects.put_exclusive(probe, b"")
        try:
            touched_s = self._objects.modified_s(LEASE_KEY)
            return touched_s, self._objects.modified_s(probe) - touched_s
        except FileNotFoundError:
            return 0.0, None
        finally:
            self._objects.delete(probe)

    def _has_exited(self, holder: Mapping[str, Any]) -> bool:
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
