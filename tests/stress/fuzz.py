"""Change stores on purpose, as an attacker could, and do everything a reader does: nothing may come of it but an error.

    python -m tests.stress.fuzz [--minutes 10] [--seed 0] [--corpus DIR]

A change is of bytes or of structure (JSON, identities, arrays, Parquet tables and pages, shards, names); digests and
checksums are made right again. A finding is whatever is not a `MervCacheError`, takes more than 2 s of processor time
or 500 MB, or ends the process; changes that led to one are kept in the corpus as (seed, words), and the corpus is run
first. Cases run in a child process, so that a crash of a decoder is a finding and not the end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import click

MAX_SECONDS, MAX_BYTES, HANG_S = 2.0, 500 << 20, 60
SINGLE = 500  # cases of one reader each after every case of a whole store


class RandomChoices:
    """Decisions of a random generator."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._rng.randint(low, max(low, high))

    def pick(self, items):
        return self._rng.choice(list(items))


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True, help="How long to go on.")
@click.option("--seed", type=int, default=0, show_default=True, help="First case; each case is a seed of its own.")
@click.option(
    "--corpus", type=click.Path(path_type=Path), help="Folder of findings to run first and to keep new ones in."
)
@click.option("--only", type=int, help="Run this one case, with its traceback.")
@click.option("--child", type=click.Path(path_type=Path), hidden=True)
def main(minutes: float, seed: int, corpus: Path | None, only: int | None, child: Path | None) -> None:
    """Read crafted stores until the time is over; exit code 1 if there is a finding."""
    if only is not None:
        sys.exit(run_one(only))
    if child is not None:
        run_child(child, minutes, seed)
        return
    findings = supervise(minutes, seed, corpus)
    sys.exit(1 if findings else 0)


def supervise(minutes: float, seed: int, corpus: Path | None) -> int:
    """Start children until the time is over; a child that dies is a finding."""
    ends, executions, single, findings = time.monotonic() + minutes * 60, 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        log = Path(folder) / "log.jsonl"
        kept = sorted(int(file.stem) for file in corpus.glob("*.json")) if corpus and corpus.exists() else []
        log.write_text(json.dumps({"corpus": kept}) + "\n")
        while (left := (ends - time.monotonic()) / 60) > 0:
            command = [
                sys.executable,
                "-m",
                "tests.stress.fuzz",
                "--child",
                folder,
                "--minutes",
                str(left),
                "--seed",
                str(seed),
            ]
            code = subprocess.run(command, check=False).returncode
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            done = [entry for entry in entries if "seed" in entry]
            executions += sum("changes" in entry for entry in done)
            single += sum(entry.get("single", 0) for entry in entries)
            for entry in done:
                if entry.get("finding"):
                    findings += 1
                    keep(corpus, entry)
            if code == 0:
                break
            died = int((Path(folder) / "current").read_text())
            findings += 1
            keep(corpus, {"seed": died, "finding": f"the process ended with code {code}"})
            seed = max([died, *(entry["seed"] for entry in done)]) + 1
            log.write_text(json.dumps({"corpus": []}) + "\n")
    click.echo(
        f"{executions} whole stores and {single} files through single readers in {minutes:g} minutes: {findings} "
        f"findings; cases up to {seed + executions}"
    )
    return findings


def keep(corpus: Path | None, entry: dict) -> None:
    click.echo(f"FINDING {json.dumps(entry)[:2000]}")
    if corpus is not None:
        corpus.mkdir(parents=True, exist_ok=True)
        (corpus / f"{entry['seed']}.json").write_text(json.dumps(entry, indent=2) + "\n")


def run_child(folder: Path, minutes: float, seed: int) -> None:
    from tests.featurestore.crafted import change, exercise
    from tests.featurestore.single_readers import cases_of, read_one
    from tests.featurestore.sound_store import add_unpublished, build

    faulthandler.enable()
    sound = folder / "sound.zarr"
    if not sound.exists():
        add_unpublished(build(sound))
    exercise(sound)  # everything is imported before time and memory are measured
    cases_of_readers = cases_of(sound)
    log = folder / "log.jsonl"
    corpus = json.loads(log.read_text().splitlines()[0])["corpus"]
    ends, cases = time.monotonic() + minutes * 60, [*corpus]
    with open(log, "a") as out:
        while time.monotonic() < ends:
            case = cases.pop(0) if cases else seed
            seed += not cases and case == seed
            (folder / "current").write_text(str(case))
            entry = judge(case, sound, folder / "case.zarr", change, exercise)
            out.write(json.dumps(entry) + "\n")
            for entry in single_readers(case, cases_of_readers, read_one):
                out.write(json.dumps(entry) + "\n")
            out.flush()


def judge(case: int, sound: Path, store: Path, change, exercise) -> dict:
    """One case: copy, change, read; what came of it."""
    shutil.rmtree(store, ignore_errors=True)
    subprocess.run(["cp", "-a", "--reflink=auto", str(sound), str(store)], check=True)
    choices = RandomChoices(case)
    words = [safely(change, store, choices) for _ in range(choices.pick((1, 1, 1, 2, 4)))]
    reset_peak()
    before, began = peak(), time.process_time()  # of all threads: other work on the machine is not the store's fault
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG_S)
    try:
        unexpected = exercise(store)
    except BaseException as error:
        unexpected = [error]
    signal.alarm(0)
    seconds, extra = time.process_time() - began, peak() - before
    problems = [f"{type(error).__name__}: {error}"[:300] + where(error) for error in unexpected]
    if seconds > MAX_SECONDS:
        problems.append(f"{seconds:.1f} s of processor time")
    if extra > MAX_BYTES:
        problems.append(f"{extra >> 20} MB")
    return {"seed": case, "changes": words, "finding": problems, "seconds": round(seconds, 3), "MB": extra >> 20}


def single_readers(case: int, cases: list, read_one) -> list[dict]:
    """Many small cases; the findings among them, and how many there were."""
    choices, findings = RandomChoices(-1 - case), []
    reset_peak()
    before = peak()
    for _ in range(SINGLE):
        began = time.process_time()
        name, data, error = read_one(choices.pick(cases), choices)
        seconds = time.process_time() - began
        problems = [f"{type(error).__name__}: {error}"[:300] + where(error)] if error else []
        problems += [f"{seconds:.1f} s of processor time"] if seconds > MAX_SECONDS else []
        if problems:
            findings.append({"seed": case, "reader": name, "bytes": data[:4096].hex(), "finding": problems})
    if peak() - before > MAX_BYTES:
        findings.append({"seed": case, "reader": "any", "finding": [f"{(peak() - before) >> 20} MB"]})
    return [*findings, {"single": SINGLE}]


def safely(change, store: Path, choices: RandomChoices) -> str:
    """A change of what an earlier change left may not be possible."""
    try:
        return change(store, choices)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return f"no change ({type(error).__name__})"


def where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/featurestore/" in frame.filename and "/tests/" not in frame.filename]
    return f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""


def hang(*_: object) -> None:
    raise TimeoutError(f"still at work after {HANG_S} s")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The process's largest resident size since `reset_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run_one(case: int) -> int:
    from tests.featurestore.crafted import change, exercise
    from tests.featurestore.sound_store import add_unpublished, build

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        sound, store = Path(folder) / "sound.zarr", Path(folder) / "case.zarr"
        add_unpublished(build(sound))
        exercise(sound)
        shutil.copytree(sound, store)
        choices = RandomChoices(case)
        for _ in range(choices.pick((1, 1, 1, 2, 4))):
            click.echo(safely(change, store, choices))
        began = time.monotonic()
        unexpected = exercise(store)
        click.echo(f"{time.monotonic() - began:.2f} s, peak {peak() >> 20} MB, process {os.getpid()}")
        for error in unexpected:
            traceback.print_exception(error)
    return 1 if unexpected else 0


if __name__ == "__main__":
    main()
