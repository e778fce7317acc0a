"""Break an extraction in every way there is, and look at what the same command makes of it afterwards.

    python -m tests.stress.faults [--kind NAME ...] [--times 1] [--seed 0]

Each kind of fault makes a store, disturbs its making, runs the same command again and judges what is there: the bytes
of an undisturbed run, no clip lost or twice, nothing for `verify --full` to find, nothing done again but the blocks in
flight. What is the machine's fault quarantines nothing; what is one clip's fault quarantines that clip alone, and the
others keep their bytes. Printed is a table of kinds, times and outcomes.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from featurestore import FeatureStore
from mervcache.errors import EXIT_WITH_FAILURES
from tests.stress.fault_bucket import credentials_expired
from tests.stress.fault_lab import (
    BLOCKS,
    FILMS,
    STILLS,
    CannotBeMade,
    FaultLab,
    Gate,
    check,
    check_sound,
    children,
    cluster,
    digests,
    own_disk,
    read_only,
    receipts,
    until,
)

SLOW = {"TINY_DELAY_S": "0.05"}  # a forward: so that there is a run to disturb


def driver_killed(lab: FaultLab, rng: random.Random) -> str:
    """The command's own process, again and again; with it goes the worker that lives in it."""
    store = lab.new_store()
    for number in range(3):
        pid = lab.start(store, SLOW)
        until(lambda: len(receipts(store)) > number)  # noqa: B023 - called at once
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        code = lab.wait()
        check(code == -signal.SIGKILL, f"a run got through, with {code}")
    lab.rerun(store)
    lab.judge(store)
    return "3 kills"


def worker_killed(lab: FaultLab, rng: random.Random) -> str:
    """One of two worker processes, while the command goes on."""
    store = lab.new_store()
    gate = Gate(store)
    pid = lab.start(store, gate.environment, workers=2)
    gate.wait()
    workers = [worker for worker in children(pid, "spawn_main") if children(worker, "pipeline.decode.worker")]
    os.kill(workers[0], signal.SIGKILL)
    gate.open()
    check(lab.wait() == 0, f"the run ended badly: {lab.output[-500:]}")
    lab.judge(store)
    return "the run went on"


def decoder_killed(lab: FaultLab, rng: random.Random) -> str:
    """A decode process: its clip is tried again."""
    hurt_decoders(lab, signal.SIGKILL)
    return "the run went on"


def decoder_stopped(lab: FaultLab, rng: random.Random) -> str:
    """A decode process that does nothing any more: at its deadline it is replaced."""
    hurt_decoders(lab, signal.SIGSTOP, decode_timeout_s=3.0)  # of a busy machine's decoder no two in a row
    return "replaced after its deadline"


def scheduler_killed(lab: FaultLab, rng: random.Random) -> str:
    """A scheduler that somebody else runs: the command says so and stops; with another one it goes on."""
    store = lab.new_store()
    gate = Gate(store)
    with cluster(lab, gate.environment) as (file, scheduler):
        lab.start(store, scheduler=str(file))
        gate.wait()
        scheduler.kill()
        code = lab.wait()
    check(code == 1 and "the scheduler is gone" in lab.output, f"{code}: {lab.output[-500:]}")
    lab.rerun(store)
    lab.judge(store)
    return "stopped with the next step"


def disk_full(lab: FaultLab, rng: random.Random) -> str:
    """A file system with room for half of the store."""
    with own_disk(lab, "size=24k,nr_inodes=400") as (place, remount):
        store = place / "features.zarr"
        stop(lab, store, "the disk is full: free space and run the same command again", block_rows={"image": STILLS})
        remount("size=9m")
        lab.finish(store, block_rows={"image": STILLS})
        check_all_there(store)
    return "stopped with the next step"


def store_read_only(lab: FaultLab, rng: random.Random) -> str:
    """The store's file system turns read-only under the run, as a faulty disk does."""
    with own_disk(lab, "size=9m") as (place, _):
        store = place / "features.zarr"
        gate = Gate(store)
        lab.start(store, gate.environment)
        gate.wait()
        with read_only(place):
            gate.open()
            code = lab.wait()
        check(code == 1 and "Read-only file system" in lab.output, f"{code}: {lab.output[-500:]}")
        lab.rerun(store)
        lab.judge(store)
    return "stopped with the next step"


def media_gone(lab: FaultLab, rng: random.Random) -> str:
    """The folder of the media is empty all at once: an unmounted share."""
    store, aside = lab.new_store(), lab.folder / "aside"
    gate = Gate(store)
    lab.start(store, gate.environment)
    gate.wait()
    lab.media.rename(aside)
    lab.media.mkdir()
    gate.open()
    try:
        code = lab.wait()
    finally:
        lab.media.rmdir()
        aside.rename(lab.media)
    check(code == 1 and "mount" in lab.output, f"{code}: {lab.output[-500:]}")
    check(FeatureStore.open(store).quarantine.num_rows == 0, "an unmounted share quarantined clips")
    lab.rerun(store)
    lab.judge(store)
    return "stopped, nothing quarantined"


def file_removed(lab: FaultLab, rng: random.Random) -> str:
    """One file is deleted after it was listed: that clip fails, and gets a new row when it is back."""
    store, file = lab.new_store(), lab.media / f"still-{STILLS - 1:02}.png"
    expected, data, gate = lab.expected_digests("tiny"), file.read_bytes(), Gate(store)
    lab.start(store, gate.environment)
    gate.wait()
    file.unlink()  # of the last block, of which nothing is decoded yet
    gate.open()
    try:
        code = lab.wait()
    finally:
        file.write_bytes(data)
    check(code == EXIT_WITH_FAILURES, f"the run ended badly: {lab.output[-500:]}")
    check_quarantine(store, {f"folder/{file.name}": "media file is missing"})
    lab.finish(store, retry_quarantine=True)
    check(digests(store, "tiny") == expected, "tokens differ from an undisturbed run's")
    check_sound(store)
    return "1 clip quarantined, then retried"


def poisonous_file(lab: FaultLab, rng: random.Random) -> str:
    """A file that crashes the process that decodes it."""
    store, file = lab.new_store(), lab.media / "film-1.mp4"
    crashing = file.with_name("film-1-crash.mp4")
    expected = lab.expected_digests("tiny")
    file.rename(crashing)
    try:
        lab.finish(store)
    finally:
        crashing.rename(file)
    check_quarantine(store, {f"folder/{crashing.name}": "decoder crashed: signal SIGSEGV"})
    expected.pop(f"folder/{file.name}")
    check(digests(store, "tiny") == expected, "neighbours of the clip lost their bytes")
    check_sound(store)
    return "1 clip quarantined"


def poisonous_clip(lab: FaultLab, rng: random.Random, workers: int = 1) -> str:
    """A clip that crashes the process that encodes it: the worker, and where that is embedded, the whole command."""
    store, starts = lab.new_store(), 1
    lab.start(store, encoders=["crashing"], workers=workers)
    while (code := lab.wait()) != EXIT_WITH_FAILURES:
        check(code == -signal.SIGABRT and starts < 3, f"{code}: {lab.output[-500:]}")
        starts += 1
        lab.start(store, encoders=["crashing"])
    reason = "encoding crashes the process: signal SIGABRT"
    check_quarantine(store, {"folder/still-06.png": reason}, scope="encoder")
    expected = lab.expected_digests("crashing")
    expected.pop("folder/still-06.png")
    check(digests(store, "crashing") == expected, "neighbours of the clip lost their bytes")
    check_sound(store)
    return f"1 clip quarantined, {starts} starts of the command"


def poisonous_clip_of_workers(lab: FaultLab, rng: random.Random) -> str:
    """The same with worker processes: the command itself goes on."""
    said = poisonous_clip(lab, rng, workers=2)
    check(said.endswith("1 starts of the command"), said)
    return "1 clip quarantined, the run went on"


def two_drivers(lab: FaultLab, rng: random.Random) -> str:
    """Two commands on one store: the second one is refused while the first is there."""
    store = lab.new_store()
    gate = Gate(store)
    lab.start(store, gate.environment)
    gate.wait()  # it stays where it is until the second one has looked
    try:
        script = Path(sys.executable).with_name("merv-pipeline")
        command = [str(script), *lab.command(store)]
        second = subprocess.run(command, env=lab.environment, capture_output=True, text=True)
    finally:
        gate.open()
    check(second.returncode == 1 and "another run works on this store" in second.stderr, second.stderr[-500:])
    check(lab.wait() == 0, f"the first one ended badly: {lab.output[-500:]}")
    lab.judge(store)
    return "the second one refused"


FAULTS: dict[str, Callable[[FaultLab, random.Random], str]] = {
    "driver killed": driver_killed,
    "worker killed": worker_killed,
    "decode process killed": decoder_killed,
    "decode process stopped": decoder_stopped,
    "scheduler killed": scheduler_killed,
    "disk full": disk_full,
    "store read-only": store_read_only,
    "media unmounted": media_gone,
    "media file removed": file_removed,
    "poisonous file": poisonous_file,
    "poisonous clip": poisonous_clip,
    "poisonous clip, 2 workers": poisonous_clip_of_workers,
    "two drivers": two_drivers,
    "credentials expired": credentials_expired,
}


def hurt_decoders(lab: FaultLab, how: signal.Signals, **settings) -> None:
    """Send a signal to every decode process; the run must come to its end all the same."""
    store = lab.new_store()
    gate = Gate(store)
    pid = lab.start(store, gate.environment, **settings)
    gate.wait()
    hurt = children(pid, "pipeline.decode.worker")
    for process in hurt:
        os.kill(process, how)
    gate.open()
    check(lab.wait() == 0 and bool(hurt), f"the run ended badly: {lab.output[-500:]}")
    lab.judge(store)


def stop(lab: FaultLab, store: Path, words: str, **settings) -> None:
    """Run into the fault; the command must stop with these words and quarantine nothing."""
    lab.start(store, **settings)
    code = lab.wait()
    check(code == 1 and words in lab.output, f"{code}: {lab.output[-500:]}")


def check_all_there(store: Path) -> None:
    opened = FeatureStore.open(store)
    check(all(opened.clips["tiny"].to_pylist()) and opened.quarantine.num_rows == 0, "not every clip has its tokens")
    check_sound(store)


def check_quarantine(store: Path, expected: dict[str, str], scope: str = "clip") -> None:
    rows = FeatureStore.open(store).quarantine.to_pylist()
    check({row["clip_id"]: row["reason"] for row in rows} == expected, f"quarantined: {rows}")
    check({row["scope"] for row in rows} == {scope}, f"quarantined: {rows}")


@click.command()
@click.option("--kind", "kinds", type=click.Choice(list(FAULTS)), multiple=True, help="Repeatable.  [default: all]")
@click.option("--times", type=click.IntRange(1), default=1, show_default=True, help="How often each.")
@click.option("--seed", default=0, show_default=True, help="Of the random moments.")
def main(kinds: tuple[str, ...], times: int, seed: int) -> None:
    """Break extractions in every way and judge what a rerun makes of them."""
    rng, broken = random.Random(seed), 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lab = FaultLab(Path(folder))
        click.echo(f"{STILLS} stills, {FILMS} films, {BLOCKS} blocks\n{'kind':26} {'time [s]':>8}  outcome")
        for kind in kinds or FAULTS:
            for _ in range(times):
                began = time.monotonic()
                try:
                    outcome = FAULTS[kind](lab, rng)
                except AssertionError as complaint:
                    outcome, broken = f"BROKEN: {complaint}", broken + 1
                except CannotBeMade as reason:
                    outcome = f"not made: {reason}"
                click.echo(f"{kind:26} {time.monotonic() - began:8.1f}  {outcome}")
        lab.close()
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
