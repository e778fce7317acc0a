"""Where faults are made: media, a program that runs extractions at once, and what an undisturbed store looks like.

Encoders are the plug-ins of `tiny_encoders`; runs are forked from one
process that has imported everything, so that hundreds of them fit into a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import yaml

from benchmarks.tiny_encoders import install
from featurestore import FeatureStore
from featurestore.maintenance.verify import verify_store
from mervcache.errors import EXIT_WITH_FAILURES

SERVER = Path(__file__).parents[1] / "pipeline" / "extract_server.py"
DETERMINISTIC = ("zarr.json", "clips", "samples", "video", "image", "receipts")
STILLS, FILMS, ROWS, BATCH = 44, 4, 4, 2  # more blocks than a worker has in flight
BLOCKS = STILLS // ROWS + FILMS // ROWS
SITE = """
import sys
if "pipeline.decode.worker" in sys.orig_argv:  # a decoder that crashes, hangs never, on files named so
    import signal
    from pipeline.decode.decoders import DECODERS
    exact = DECODERS["frames/1"]
    def moody(source, collector, **options):
        if "crash" in source.path:
            signal.raise_signal(signal.SIGSEGV)
        return exact(source, collector, **options)
    DECODERS["frames/1"] = moody
"""


class FaultLab:
    """Media, settings, and runs of `merv-pipeline extract`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.media, plugins = folder, folder / "media", folder / "plugins"
        install(plugins)
        (plugins / "sitecustomize.py").write_text(SITE)
        draw_media(self.media)
        paths = [str(plugins), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-P", str(SERVER)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, **pipes, text=True, env=self.environment)
        assert self._server.stdout.readline() == "ready\n"
        self._running: int | None = None
        self._expected: dict[str, dict[str, str]] = {}

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()

    def new_store(self) -> Path:
        return self.folder / f"store-{time.monotonic_ns()}" / "features.zarr"

    def command(self, store: Path | str, **settings) -> list[str]:
        """Arguments of an extraction of all media."""
        file = self.folder / f"config-{time.monotonic_ns()}.yaml"
        file.write_text(yaml.safe_dump(tiny_settings(self.media, store, **settings)))
        return ["extract", "--config", str(file), "--json"]

    def start(self, store: Path | str, environment: dict[str, str] | None = None, **settings) -> int:
        """Start an extraction; returns the id of its process."""
        if self._running:  # left by a fault that went wrong
            os.kill(self._running, signal.SIGKILL)
            self.wait()
        request = {"arguments": self.command(store, **settings), "output": str(self.folder / "output")}
        self._server.stdin.write(json.dumps(request | {"environment": environment or {}}) + "\n")
        self._server.stdin.flush()
        self._running = int(self._server.stdout.readline())
        return self._running

    def wait(self) -> int:
        """The exit code, or minus the signal."""
        self._running = None
        return int(self._server.stdout.readline())

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def finish(self, store: Path | str, environment: dict[str, str] | None = None, **settings) -> dict:
        """Run to the end; returns the summary."""
        self.start(store, environment, **settings)
        code = self.wait()
        check(code in (0, EXIT_WITH_FAILURES), f"the rerun ended with {code}: {self.output[-2000:]}")
        summary, _ = json.JSONDecoder().raw_decode(self.output[self.output.index("{") :])
        check(
            (code == 0) == (summary["quarantined"] == 0), f"it ended with {code}, {summary['quarantined']} clips failed"
        )
        return summary

    def rerun(self, store: Path, **settings) -> dict:
        """Go on, and check that nothing that was committed is done again or touched."""
        before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in receipts(store)}
        summary = self.finish(store, **settings)
        check(summary["blocks"] <= BLOCKS - len(before), f"{summary['blocks']} blocks redone beside {len(before)}")
        touched = [path for path, then in before.items() if (path.stat().st_ino, path.stat().st_mtime_ns) != then]
        check(not touched, f"receipts were touched: {touched}")
        return summary

    def judge(self, store: Path, name: str = "tiny") -> None:
        """The bytes of an undisturbed run, every clip once, nothing for `verify` to find, nothing left lying about."""
        if name not in self._expected:
            whole = self.new_store()
            self.finish(whole, {"TINY_HARMLESS": "1"}, encoders=[name])
            self._expected[name] = hashes(whole)
        check(hashes(store) == self._expected[name], "the bytes are not those of an undisturbed run")
        check_sound(store)

    def expected_digests(self, name: str) -> dict[str, str]:
        """Clip -> digest of its tokens where nothing went wrong."""
        whole = self.new_store()
        self.finish(whole, {"TINY_HARMLESS": "1"}, encoders=[name])
        return digests(whole, name)


def tiny_settings(media: Path, store: Path | str, **settings) -> dict:
    """Of an extraction of `media` by the encoder that costs next to nothing, as a config file says them."""
    return {
        "dataset": "folder",
        "root": str(media),
        "store": str(store),
        "encoders": ["tiny"],
        "weights": "random:0",
        "grid": [2, 2, 2],
        "compute_dtype": "float32",
        "block_rows": {"video": ROWS, "image": ROWS},
        "batch": {"video": BATCH, "image": BATCH},
        "threads": 1,
        "decode_processes": 1,
        "device": "cpu",
        **settings,
    }


def check(is_so: bool, complaint: str) -> None:
    if not is_so:
        raise AssertionError(complaint)


def check_sound(store: Path) -> None:
    findings = verify_store(store, "full")
    check(not findings, f"verify finds {findings[:3]}")
    left = [path for path in (store / "tmp").rglob("*") if path.is_file() and path.suffix != ".lock"]
    check(not left, f"left behind: {left}")
    ids = FeatureStore.open(store).clips["clip_id"].to_pylist()
    check(len(ids) == len(set(ids)) == STILLS + FILMS, f"{len(ids)} clips of {STILLS + FILMS}")


def digests(store: Path, name: str) -> dict[str, str]:
    """Clip -> digest of its stored tokens, for clips that have some."""
    opened = FeatureStore.open(store)
    ids = opened.clips.filter(opened.clips[name])["clip_id"].to_pylist()
    return {clip: hashlib.sha256(opened.read([clip], encoder=name).tobytes()).hexdigest() for clip in ids}


def hashes(store: Path) -> dict[str, str]:
    """sha256 of every file that is a function of the input."""
    found = [file for top in DETERMINISTIC for file in [store / top, *(store / top).rglob("*")] if file.is_file()]
    return {file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def receipts(store: Path) -> list[Path]:
    return list(store.glob("receipts/*/*/*.json"))


def until(condition: Callable[[], bool], within_s: float = 300.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        check(time.monotonic() < deadline, "what the fault waits for did not happen")
        time.sleep(0.002)


def children(pid: int, word: str) -> list[int]:
    """Processes under `pid`, at any depth, whose command line holds `word`."""
    parents, lines = {}, {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            if folder.name.isdigit():
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(folder.name)] = (folder / "cmdline").read_text()

    def is_under(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == pid:
                return True
        return False

    return [process for process, line in lines.items() if word in line and is_under(process)]


class Gate:
    """A place where a run waits: before a forward of its encoder, a block committed and half of the next one done."""

    def __init__(self, store: Path) -> None:
        self._file = store.parent.with_name(f"gate-{time.monotonic_ns()}")
        self.environment = {"TINY_GATE": str(self._file), "TINY_GATE_STORE": str(store)}

    def wait(self) -> None:
        """Until a run stands before it."""
        until(Path(f"{self._file}.reached").exists)

    def open(self) -> None:
        self._file.touch()


@contextmanager
def own_disk(lab: FaultLab, options: str) -> Iterator[tuple[Path, Callable[[str], bool]]]:
    """A RAM disk of the fault's own, and what mounts it anew with other options; only root may."""
    place = lab.folder / f"disk-{time.monotonic_ns()}"
    place.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def mount_again(options: str) -> bool:
        return mount(f"remount,{options}")

    if os.geteuid() or not mount(options):
        raise CannotBeMade("only root may mount a disk of its own")
    try:
        yield place, mount_again
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """The folder as a read-only mount of itself: also under who writes there, where a disk cannot be remounted."""
    for options in (["--bind", str(place)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *options, str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


class CannotBeMade(Exception):
    """This fault needs a right that we do not have here."""


@contextmanager
def cluster(lab: FaultLab, environment: dict[str, str]) -> Iterator[tuple[Path, subprocess.Popen]]:
    """A scheduler and a worker as somebody else would start them."""
    file = lab.folder / f"scheduler-{time.monotonic_ns()}.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": lab.environment | environment}
    dask = [sys.executable, "-P", "-m"]
    scheduler = subprocess.Popen(
        [*dask, "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
        **quiet,
    )
    until(file.exists)
    worker = subprocess.Popen(
        [*dask, "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny"],
        **quiet,
    )
    try:
        yield file, scheduler
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()


def draw_media(folder: Path) -> None:
    """Stills, one of them white all over, and films."""
    import av
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(STILLS):
        picture = rng.integers(0, 200, (24, 32, 3), dtype=np.uint8)
        if number == 6:
            picture[:] = 255
        Image.fromarray(picture).save(folder / f"still-{number:02}.png")
    for number in range(FILMS):
        with av.open(str(folder / f"film-{number}.mp4"), "w") as output:
            stream = output.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for _ in range(8):
                frame = av.VideoFrame.from_ndarray(rng.integers(0, 200, (32, 32, 3), dtype=np.uint8), format="rgb24")
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
