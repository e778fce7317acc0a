"""Counters of the work at every worker's `/metrics` endpoint, Dask's dashboard over ssh, and its report as a file.

Without prometheus_client, which the endpoint needs, a count is kept in this process and not exported.
"""

from __future__ import annotations

import getpass
import logging
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mervcache.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Client
    from prometheus_client.core import CounterMetricFamily

PREFIX = "merv"
_LINKS = re.compile(r"<link\b[^>]*>")  # in Dask's template: an icon on a web server

Labels = tuple[tuple[str, str], ...]  # sorted

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Counter:
    help: str
    totals: dict[Labels, float] = field(default_factory=dict)


_counters: dict[str, _Counter] = {}
_lock = threading.Lock()  # tasks count while the endpoint's thread reads
_is_registered = False


def count(name: str, help: str, amount: float = 1, **labels: str) -> None:
    """Add to the total of a name and its labels, in this process; `clips` is exported as `merv_clips_total`."""
    key = tuple(sorted(labels.items()))
    with _lock:
        _register()
        totals = _counters.setdefault(name, _Counter(help=help)).totals
        totals[key] = totals.get(key, 0.0) + amount


def total(name: str, **labels: str) -> float:
    """The total that this process has counted."""
    with _lock:
        counter = _counters.get(name)
        return counter.totals.get(tuple(sorted(labels.items())), 0.0) if counter else 0.0


def _register() -> None:
    """Register the collector, once per process; Dask's endpoint prints the registry of prometheus_client."""
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
    """Called by prometheus_client at every request."""

    def describe(self) -> list[CounterMetricFamily]:
        return []  # names are not known before they are counted

    def collect(self) -> Iterator[CounterMetricFamily]:
        from prometheus_client.core import CounterMetricFamily

        with _lock:
            known = [(name, counter.help, dict(counter.totals)) for name, counter in _counters.items()]
        for name, help, totals in known:
            labels = [label for label, _ in next(iter(totals))]
            family = CounterMetricFamily(f"{PREFIX}_{name}", help, labels=labels)
            for key, amount in totals.items():
                family.add_metric([value for _, value in key], amount)
            yield family


def dashboard_lines(client: Client) -> list[str]:
    """Lines with the dashboard's address and the ssh command that forwards it."""
    link = urlsplit(client.dashboard_link or "")
    if not link.port:
        return ["dashboard: this scheduler has none; start it with bokeh installed and --dashboard-address 127.0.0.1:0"]
    bound = client.run_on_scheduler(_http_host)
    host = link.hostname if bound in ("", "0.0.0.0", "::") else bound
    port, login = link.port, f"{getpass.getuser()}@{socket.gethostname()}"
    return [
        f"dashboard: http://{host}:{port}{link.path}",
        f"from another machine: ssh -N -L {port}:{host}:{port} {login}   then open http://localhost:{port}{link.path}",
        f"for Prometheus: http://{host}:{port}/metrics of the scheduler, and /metrics of every worker",
    ]


def _http_host(dask_scheduler: Any) -> str:
    """The address that the scheduler's HTTP server listens on; Dask's link names the scheduler's own instead."""
    return dask_scheduler.http_server.address


@contextmanager
def performance_report(path: Path | None) -> Iterator[None]:
    """Save Dask's report of the block as one HTML page, also if the block fails; None: no report.

    The page holds Bokeh's scripts and loads nothing, so that it opens on a machine without network.
    """
    if path is None:
        yield
        return
    try:
        import bokeh  # noqa: F401  Dask draws with it
    except ImportError as error:
        raise ClusterError("a performance report needs bokeh: pip install 'merv-pipeline[dashboard]'") from error
    from distributed import performance_report as dask_report

    path.parent.mkdir(parents=True, exist_ok=True)
    report = dask_report(filename=str(path), mode="inline")
    report.__enter__()
    try:
        yield
    finally:
        try:
            report.__exit__(None, None, None)
            path.write_text(_LINKS.sub("", path.read_text()))
        except Exception as error:  # a scheduler that left or has no bokeh; the run's own result is what counts
            log.warning("no performance report: %s: %s", type(error).__name__, error)
