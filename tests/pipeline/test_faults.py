"""Killed, interrupted, out of disk: the next run ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from featurestore import FeatureStore, verify_store
from featurestore.clips import Clip
from mervcache.errors import EXIT_WITH_FAILURES, RunStoppedError
from pipeline.decode.pool import DecodePool
from pipeline.decode.sampling import DecodeJob
from pipeline.views import ResizeRule, View

pytestmark = pytest.mark.slow

SERVER = Path(__file__).with_name("extract_server.py")
KILLS = int(os.environ.get("MERV_KILLS", "8"))
NUM_BLOCKS = 5


class Server:
    """Runs `merv-pipeline` in processes that start at once; see the program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-P", str(SERVER)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, settings: dict) -> int:
        """Start an extraction; returns the id of its process."""
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        request = {"arguments": ["extract", "--config", str(config)], "output": str(self.folder / "output")}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """The exit code, or minus the signal."""
        return int(self.process.stdout.readline())

    def run(self, settings: dict) -> None:
        self.start(settings)
        assert self.wait() == EXIT_WITH_FAILURES, self.output  # one film is broken

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="module")
def spoilt_root(media_root, tmp_path_factory) -> Path:
    """The media with one broken film among them: failures must be deterministic as well."""
    root = tmp_path_factory.mktemp("spoilt") / "media"
    shutil.copytree(media_root, root)
    (root / "valley/v6.mp4").write_bytes(b"not a film")
    return root


@pytest.fixture(scope="module")
def undisturbed(spoilt_root, extracted, server, tmp_path_factory) -> tuple[dict, float]:
    """Hashes of a store that nobody disturbed, and how long its making took [s]."""
    folder = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    server.run(extracted.settings(root=spoilt_root, store=folder / "store.zarr"))
    return extracted.hashes(folder / "store.zarr"), time.monotonic() - began


def receipts(store: Path) -> int:
    return len(list(store.glob("receipts/*/*/*.json")))


def until(condition: Callable[[], bool], within_s: float = 300.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.002)


def test_killed_at_any_moment_a_store_ends_with_the_bytes_of_an_undisturbed_one(lab, server, spoilt_root, undisturbed):
    expected, duration_s = undisturbed
    rng, killed, finished = random.Random(0), 0, 0
    while killed < KILLS:
        store = lab.folder / f"{finished}.zarr"
        pid, had = server.start(lab.settings(root=spoilt_root, store=store)), receipts(store)
        if killed % 2:  # while it commits: the moments that matter most
            with suppress(AssertionError):
                until(lambda: receipts(store) > had, within_s=duration_s)  # noqa: B023 - called at once
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0, duration_s))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code = server.wait()
        killed += code == -signal.SIGKILL
        if code == EXIT_WITH_FAILURES:  # it was done before: this store is judged, and another one begun
            check_finished(lab, store, expected)
            finished += 1
            assert finished < 2 * KILLS
    server.run(lab.settings(root=spoilt_root, store=store))
    check_finished(lab, store, expected)


def test_windows_of_videos_survive_a_kill_as_clips_do(lab, server, spoilt_root):
    settings = lab.settings(
        root=spoilt_root, store=lab.folder / "undisturbed.zarr", kind="video", encoders=["siglip"], fps=8, window=2
    )
    server.run(settings)
    store = lab.folder / "killed.zarr"
    pid = server.start(settings | {"store": str(store)})
    until(lambda: receipts(store) > 2)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    server.wait()
    server.run(settings | {"store": str(store)})
    check_finished(lab, store, lab.hashes(lab.folder / "undisturbed.zarr"))


def check_finished(lab, store: Path, expected: dict) -> None:
    assert lab.hashes(store) == expected
    assert verify_store(store, "full") == []
    assert not [path for path in (store / "tmp").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_an_interrupt_ends_with_130_and_a_store_that_opens_and_can_be_gone_on_with(
    lab, server, spoilt_root, undisturbed
):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a person's, a cluster's, a closed terminal's
        settings = interrupted(server, lab, spoilt_root, number)
        assert "What was committed is kept; run the same command again to go on." in server.output
        assert "Traceback" not in server.output
        clips = FeatureStore.open(settings["store"]).clips
        assert any(any(clips[name].to_pylist()) for name in lab.ENCODERS)
        committed = sum(all(row[name] for name in lab.ENCODERS) for row in clips.to_pylist())
        assert f"stopped: {committed} of {len(clips)} clips listed are committed" in server.output
        server.run(settings)
        assert lab.hashes(Path(settings["store"])) == undisturbed[0]


def interrupted(server: Server, lab, root: Path, number: int) -> dict:
    """Settings of a run that a signal ended after its first commit; one that was faster than we are is made anew."""
    for attempt in range(5):
        store = lab.folder / f"{number}-{attempt}.zarr"
        settings = lab.settings(root=root, store=store)
        pid = server.start(settings)
        until(lambda: receipts(store) > 0)  # noqa: B023 - called at once
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        if (code := server.wait()) != EXIT_WITH_FAILURES:
            assert code == 130, server.output
            return settings
    raise AssertionError("no run could be interrupted")


def children(pid: int, word: str) -> list[int]:
    """Processes started by `pid` whose command line holds `word`."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            if folder.name.isdigit() and word in (folder / "cmdline").read_text():
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(folder.name)] * (parent == pid)
    return found


def test_a_decode_process_that_is_killed_costs_a_second_try_and_nothing_else(lab, extracted):
    killed, is_over = [], threading.Event()

    def kill_one_per_block() -> None:
        blocks = 0  # a clip that loses its process twice is quarantined, so a block is committed between two kills
        first: list[int] = []  # their successors are spared: a process that dies twice while it starts ends the run
        while not is_over.is_set():
            first = first or children(os.getpid(), "pipeline.decode.worker")
            left = [pid for pid in first if pid not in killed]
            if left and receipts(lab.store) >= 4 * blocks:
                os.kill(left[0], signal.SIGKILL)
                killed.append(left[0])
                blocks = receipts(lab.store) // 4 + 1  # four encoders; the block that has lost it, at the latest
            time.sleep(0.002)

    killer = threading.Thread(target=kill_one_per_block)
    killer.start()
    try:
        summary = lab.extract()
    finally:
        is_over.set()
        killer.join()
    assert (summary.clips, summary.failed) == (14, 0)
    assert killed
    assert lab.hashes(lab.store) == extracted.hashes(extracted.store)


def test_a_decode_process_that_dies_while_it_starts_is_started_again(media_root, tmp_path):
    die_first = (
        "import os, pathlib, sys\n"
        "mark = pathlib.Path(sys.argv.pop(1))\n"
        "if not mark.exists():\n"
        "    mark.touch()\n"
        "    os.kill(os.getpid(), 9)\n"
        "from pipeline.decode import worker\n"
        "worker.main()\n"
    )
    clip = Clip(dataset="d", path="valley/v8.mp4", kind="video")
    view = View(rule=ResizeRule(size=8), num_frames=4)
    command = (sys.executable, "-P", "-c", die_first, str(tmp_path / "mark"))
    with DecodePool(1, worker_command=command) as pool:
        decoded = pool.submit(DecodeJob(root=str(media_root), clip=clip, views=(view,))).result()
    assert decoded.num_frames == 64
    assert (tmp_path / "mark").exists()


def test_with_two_workers_one_of_them_killed_the_bytes_are_those_of_one(lab, tmp_path):
    """In a folder that holds packages of our names: neither the script nor what it starts may import those."""
    for name in ("featurestore", "jobs", "pipeline", "trainer"):
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "__init__.py").write_text("raise ImportError('not the installed one')")
    config = tmp_path / "config.yaml"
    settings = lab.settings(encoders=["languagebind"], workers=2)  # the encoder that loads fastest
    config.write_text(yaml.safe_dump(settings))
    script = Path(sys.executable).with_name("merv-pipeline")
    command = [str(script), "extract", "--config", str(config), "--json"]
    with subprocess.Popen(
        command, cwd=tmp_path / "here", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        working: list[int] = []

        def one_works() -> bool:
            """A worker that has started to decode is in its first block; the other one still loads the encoder."""
            working[:] = [pid for pid in children(run.pid, "spawn_main") if children(pid, "pipeline.decode.worker")]
            return bool(working) or run.poll() is not None

        until(one_works)
        assert working, run.communicate()
        os.kill(working[0], signal.SIGKILL)
        assert receipts(lab.store) < NUM_BLOCKS
        output, errors = run.communicate()
    assert run.returncode == 0, errors
    assert json.loads(output)["clips"] <= 14  # what the killed one had committed is not reported
    single = lab.folder / "single.zarr"
    lab.extract(encoders=["languagebind"], store=single)
    assert lab.hashes(lab.store) == lab.hashes(single)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """A place that runs full: a RAM disk where we may mount one, else a limit on the size of files.

    Yields the reason that must be shown, and what makes room.
    """

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        return subprocess.run(command, capture_output=True).returncode == 0

    folder.mkdir()
    if mount(f"size={num_bytes}"):
        try:
            yield "the disk is full: free space and run the same command again", lambda: mount("remount,size=9m")
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 4096, before[1]))
    try:
        yield "File too large", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_the_run_with_the_next_step_and_quarantines_nothing(lab):
    place = lab.folder / "small"
    changes = {"encoders": ("siglip",), "store": place / "store.zarr", "block_rows": {"video": 16, "image": 16}}
    with small_disk(place, 100 << 10) as (reason, make_room):
        with pytest.raises(RunStoppedError) as stopped:
            lab.extract(**changes)
        assert reason in str(stopped.value)
        assert "again" in str(stopped.value)
        make_room()
        assert lab.extract(**changes).failed == 0
        store = FeatureStore.open(place / "store.zarr")
        assert (store.clips["siglip"].to_pylist(), store.quarantine.num_rows) == ([True] * 14, 0)
        assert verify_store(place / "store.zarr", "full") == []
