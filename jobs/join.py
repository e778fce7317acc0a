"""A scheduler that somebody else runs, by address or by scheduler file: joined, and left running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.request import ClusterError, ClusterRequest

if TYPE_CHECKING:
    from distributed import Client


@contextmanager
def join(request: ClusterRequest, say: Callable[[str], None]) -> Iterator[Client]:
    """Its workers are what they are; the run starts when as many are there as it wants."""
    from distributed import Client

    by_file = Path(request.scheduler).is_file()
    address = {"scheduler_file": request.scheduler} if by_file else {"address": request.scheduler}
    try:
        client = Client(**address, timeout="10 s")
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {request.scheduler}: {error}") from error
    with client:
        wanted, wait_s = request.num_workers or 1, request.worker_wait_s
        if (found := len(client.scheduler_info(n_workers=-1)["workers"])) < wanted:
            say(f"{request.scheduler}: {found} of {wanted} workers are there, waiting {wait_s:.0f} s for the others")
        try:
            client.wait_for_workers(wanted, timeout=wait_s)
        except TimeoutError as error:
            found = len(client.scheduler_info(n_workers=-1)["workers"])
            raise ClusterError(
                f"{request.scheduler} has {found} workers after {wait_s:.0f} s, the run wants {wanted}; "
                "start more with `dask worker ADDRESS --nthreads 1`"
            ) from error
        yield client
