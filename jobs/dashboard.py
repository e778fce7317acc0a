"""Seeing a run from outside: Dask's dashboard and how to reach it over ssh, and its report as a file."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jobs.request import ClusterError

if TYPE_CHECKING:
    from distributed import Client


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
