"""A courtesy between drivers: who is working on this store just now.

Two drivers on one store are safe (puts are exclusive) but waste work, so a driver takes the lease and others are told.
The holder touches the file; a lease untouched for `stale_after_s`, or whose process on this host is gone, is nobody's.
Correctness never depends on it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

from featurestore.errors import UserError
from featurestore.layout import TEMPORARY
from featurestore.objects import machine_faults

STALE_AFTER_S = 120.0
LEASE_NAME = "driver.lease"


class StoreLease:
    """`with StoreLease(path, run_id): ...` raises UserError if another driver is at work."""

    def __init__(self, path: str | Path, run_id: str, *, stale_after_s: float = STALE_AFTER_S) -> None:
        self._file = Path(path) / TEMPORARY / LEASE_NAME
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": run_id}
        self._stale_after_s = stale_after_s
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> StoreLease:
        with machine_faults("take the store's lease"):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            while not self._try_create():
                self._refuse_if_fresh()
                with suppress(FileNotFoundError):
                    self._file.unlink()
        self._heart = threading.Thread(target=self._beat, name="store-lease", daemon=True)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._heart:
            self._heart.join()
        if self.holder() == self._owner:
            with suppress(OSError):
                self._file.unlink()

    def holder(self) -> dict | None:
        """{"host", "pid", "run"} of the lease file, or None."""
        try:
            return json.loads(self._file.read_text())
        except (OSError, ValueError):
            return None

    def _try_create(self) -> bool:
        try:
            handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(self._owner, file)
        return True

    def _refuse_if_fresh(self) -> None:
        age_s, holder = self._age_s(), self.holder() or {}
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

    def _age_s(self) -> float | None:
        """Age by the file system's own clock: the clocks of two hosts may differ by minutes."""
        probe = self._file.with_name(f"clock-{os.getpid()}-{threading.get_ident()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self._file.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            with suppress(OSError):
                probe.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(self._stale_after_s / 4):
            with suppress(OSError):  # a missed beat is harmless, see above
                os.utime(self._file)
