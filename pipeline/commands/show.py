"""What every command does around its one library call: friendly errors, progress, results as a table or as JSON."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from featurestore.errors import MervCacheError
from jobs.clusters import ClusterError


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Errors that carry a message for a person are printed without a traceback; exit code 1."""
    try:
        yield
    except (MervCacheError, ClusterError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("\nInterrupted. What was committed is kept; run the same command again to go on.", err=True)
        sys.exit(130)


@contextmanager
def told_interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM are answered at once, for what runs may need a while to stop; the second one is final."""

    def answer(number: int, frame: Any) -> None:
        signal.signal(number, signal.default_int_handler)
        click.echo("\nstopping: what is committed is kept (once more to stop without waiting)", err=True)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, answer)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


def show_result(result: Any, as_json: bool, show: Callable[[], None]) -> None:
    """JSON on stdout for a program, else what `show` prints for a person."""
    if as_json:
        click.echo(json.dumps(result, indent=2, default=str))
    else:
        show()


@contextmanager
def progress(label: str, unit: str) -> Iterator[tuple[Callable[[int], None], Callable[..., None]]]:
    """Two functions for a library call: one is told the total, the other is called for each item done."""
    from jobs.progress import RunProgress  # rich

    bars: list[RunProgress] = []

    def total(count: int) -> None:
        bars.append(RunProgress(label, total=count, unit=unit).__enter__())

    def done(num_bytes: int | None = None) -> None:
        bars[0].advance(1, **({} if num_bytes is None else {"MB": num_bytes / 1e6}))

    try:
        yield total, done
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)


def tell_kept(keep: Callable[[], str]) -> None:
    """Keep a measurement in the journal where the store can be written; it is worth printing all the same."""
    try:
        click.echo(f"kept as {keep()}", err=True)
    except MervCacheError as error:
        click.echo(f"not kept in the store: {error}", err=True)
