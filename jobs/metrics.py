"""Counters of the work itself, beside Dask's own, at every worker's `/metrics` for Prometheus.

Comes in: names, amounts and labels, counted in the process where the work happens. The first count registers a
collector with prometheus_client, whose registry is what Dask's endpoint prints; without that package counting costs a
dictionary entry and nobody reads it. The room knows no names of its own.

Seeing a run from outside: Dask's dashboard and how to reach it over ssh, and its report as a file.
"""

from __future__ import annotations

import getpass
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mervcache.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Client
    from prometheus_client.core import CounterMetricFamily

PREFIX = "merv"

Labels = tuple[tuple[str, str], ...]


@dataclass(kw_only=True)
class _Counter:
    """One name's totals, by its labels."""

    meaning: str
    totals: dict[Labels, float] = field(default_factory=dict)


_counters: dict[str, _Counter] = {}
_lock = threading.Lock()  # tasks count, the endpoint's thread reads
_is_registered = False


def count(name: str, meaning: str, amount: float = 1, **labels: str) -> None:
    """Add to a total; `clips` becomes `merv_clips_total`. A name always has the same labels."""
    key = tuple(sorted(labels.items()))
    with _lock:
        _register()
        totals = _counters.setdefault(name, _Counter(meaning=meaning)).totals
        totals[key] = totals.get(key, 0.0) + amount


def total(name: str, **labels: str) -> float:
    """What was counted in this process so far."""
    with _lock:
        counter = _counters.get(name)
        return counter.totals.get(tuple(sorted(labels.items())), 0.0) if counter else 0.0


def _register() -> None:
    """Once per process, and only where somebody installed the package."""
    global _is_registered
    if _is_registered:
        return
    _is_registered = True
    try:
        from prometheus_client import REGISTRY  # optional
    except ImportError:
        return
    REGISTRY.register(_Collector())


class _Collector:
    """What prometheus_client asks at every look."""

    def describe(self) -> list[CounterMetricFamily]:
        return []  # names come as they are counted

    def collect(self) -> Iterator[CounterMetricFamily]:
        from prometheus_client.core import CounterMetricFamily

        with _lock:
            known = [(name, counter.meaning, dict(counter.totals)) for name, counter in _counters.items()]
        for name, meaning, totals in known:
            labels = [label for label, _ in next(iter(totals))]
            family = CounterMetricFamily(f"{PREFIX}_{name}", meaning, labels=labels)
            for key, amount in totals.items():
                family.add_metric([value for _, value in key], amount)
            yield family


def dashboard_lines(client: Client) -> list[str]:
    """Where the dashboard is, and the command that brings it to a laptop."""
    link = client.dashboard_link
    address = urlsplit(link or "")
    if not address.port:
        return ["dashboard: this scheduler has none; start it with bokeh installed and --dashboard-address :8787"]
    port, login = address.port, f"{getpass.getuser()}@{socket.gethostname()}"
    return [
        f"dashboard: {link}",
        f"from another machine: ssh -N -L {port}:{address.hostname}:{port} {login}   then open "
        f"http://localhost:{port}/status",
        f"for Prometheus: http://{address.hostname}:{port}/metrics of the scheduler, and /metrics of every worker",
    ]


@contextmanager
def performance_report(path: Path | None, say: Callable[[str], None]) -> Iterator[None]:
    """Save Dask's report of what runs inside as one HTML page, also where it ends with an error; None: no report."""
    if path is None:
        yield
        return
    try:
        import bokeh  # noqa: F401  Dask draws with it
    except ImportError as error:
        raise ClusterError("a performance report needs bokeh: pip install 'merv-pipeline[dashboard]'") from error
    from distributed import performance_report as report_of_dask

    path.parent.mkdir(parents=True, exist_ok=True)
    report = report_of_dask(filename=str(path))
    report.__enter__()
    try:
        yield
    finally:
        try:
            report.__exit__(None, None, None)
        except Exception as error:  # a scheduler that left, or that has no bokeh: the run's own end is what counts
            say(f"no performance report: {type(error).__name__}: {error}")
