"""The pool with decoders that hang, crash, talk and eat: one clip fails, its neighbours do not."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.decode.decoders import decode_clip
from pipeline.decode.pool import DecodePool

pytestmark = pytest.mark.slow

HOSTILE = (sys.executable, "-P", str(Path(__file__).with_name("hostile_worker.py")))


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def eventually(condition, within_s: float = 120.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def clip_file(studio):
    return studio.film("a.mp4", options={"g": "12", "bf": "2"})


@pytest.fixture(scope="module")
def real_pool():
    with DecodePool(2) as pool:
        yield pool


def test_pool_gives_what_decode_clip_gives(studio, clip_file, real_pool) -> None:
    jobs = [studio.job(clip_file, end_frame=end) for end in (3, 20, 59)]
    for job, future in [(job, real_pool.submit(job)) for job in jobs]:
        here, there = decode_clip(job), future.result()
        assert all(np.array_equal(here.frames[view], there.frames[view]) for view in job.views)
        for name in ("media_sha256", "decoder", "num_frames", "fps"):
            assert getattr(here, name) == getattr(there, name)


def test_errors_of_the_child_are_raised_with_their_type_reason_and_digest(studio, clip_file, real_pool) -> None:
    bad = studio.bytes("b.mp4", b"no video")
    with pytest.raises(MediaError, match="not a video") as caught:
        real_pool.submit(studio.job(bad)).result()
    assert len(caught.value.media_sha256) == 64
    with pytest.raises(UserError, match="unknown decoder"):
        real_pool.submit(studio.job(clip_file, decoder="opencv")).result()
    missing = studio.job(clip_file)
    clip_file.unlink()
    with pytest.raises(MediaError, match="media file is missing"):
        real_pool.submit(missing).result()
    bad.unlink()
    with pytest.raises(RunStoppedError, match="dataset root"):
        real_pool.submit(missing).result()


BAD_DECODERS = {
    "spin": "decoding timed out twice",
    "ignore_signals_and_spin": "decoding timed out twice",
    "stop_itself": "decoding timed out twice",
    "crash": "decoder crashed: signal SIGSEGV",
    "exit_quietly": "decoder crashed: exit status 3",
    "eat_memory": "decoding needs more memory than a decode process may use",
    "bug": "decoder failed: KeyError",
}


def test_each_bad_clip_fails_with_its_reason_and_its_neighbours_succeed(studio, clip_file) -> None:
    with DecodePool(3, timeout_s=3.0, worker_command=HOSTILE) as pool:
        bad, good = {}, []
        for decoder in BAD_DECODERS:
            bad[decoder] = pool.submit(studio.job(clip_file, decoder=decoder))
            good.append(pool.submit(studio.job(clip_file)))
        reasons = {decoder: str(future.exception()) for decoder, future in bad.items()}
        assert reasons == BAD_DECODERS
        assert all(isinstance(future.exception(), MediaError) for future in bad.values())
        sha256 = hashlib.sha256(clip_file.read_bytes()).hexdigest()
        assert {future.exception().media_sha256 for future in bad.values()} == {sha256}
        assert [studio.numbers(future.result())[-1] for future in good] == [59] * len(good)


def test_crash_that_does_not_repeat_costs_nothing(studio, clip_file) -> None:
    with DecodePool(1, worker_command=HOSTILE) as pool:
        decoded = pool.submit(studio.job(clip_file, decoder="crash_once")).result()
    assert studio.numbers(decoded)[-1] == 59
    assert (studio.folder / "has-crashed").exists()


def test_what_a_decoder_prints_or_reads_does_not_reach_the_messages(studio, clip_file) -> None:
    with DecodePool(1, worker_command=HOSTILE) as pool:
        assert studio.numbers(pool.submit(studio.job(clip_file, decoder="talk")).result())[-1] == 59


def test_what_is_not_the_clips_doing_stops_the_run_and_blames_no_clip(studio, clip_file) -> None:
    hanging = studio.film("hangs.mp4")
    with DecodePool(2, timeout_s=1.0, worker_command=HOSTILE) as pool:
        stalled, killed = pool.submit(studio.job(hanging)), pool.submit(studio.job(clip_file, decoder="be_killed"))
        with pytest.raises(RunStoppedError, match=r"hangs.mp4 .* twice: .* share hangs"):
            stalled.result()
        with pytest.raises(
            RunStoppedError, match=r"a.mp4 was killed from outside \(signal SIGKILL\), twice; .* memory"
        ):
            killed.result()


def test_run_stopped_in_the_child_is_run_stopped_here(studio, clip_file) -> None:
    with (
        DecodePool(1, worker_command=HOSTILE) as pool,
        pytest.raises(RunStoppedError, match=r"^the share is gone$"),
    ):
        pool.submit(studio.job(clip_file, decoder="lose_the_share")).result()


def test_programs_that_a_decoder_started_are_killed_with_it(studio, clip_file) -> None:
    with DecodePool(1, timeout_s=1.0, worker_command=HOSTILE) as pool:
        with pytest.raises(MediaError, match="timed out"):
            pool.submit(studio.job(clip_file, decoder="start_a_program")).result()
        pid = int((studio.folder / "program").read_text())
    assert eventually(lambda: not is_alive(pid))


def test_process_that_cannot_start_stops_the_run_with_its_last_words(studio, clip_file) -> None:
    command = (sys.executable, "-P", "-c", "import sys; sys.exit('no such library')")
    with (
        DecodePool(1, worker_command=command) as pool,
        pytest.raises(RunStoppedError, match=r"did not start; .* no such library"),
    ):
        pool.submit(studio.job(clip_file)).result()
    with (
        DecodePool(1, worker_command=("/no/such/python",)) as pool,
        pytest.raises(RunStoppedError, match="cannot start"),
    ):
        pool.submit(studio.job(clip_file)).result()


def test_closing_kills_what_runs_and_cancels_what_waits(studio, clip_file) -> None:
    pool = DecodePool(1, worker_command=HOSTILE)
    running, waiting = (pool.submit(studio.job(clip_file, decoder="write_pid_and_spin")) for _ in range(2))
    assert eventually(lambda: (studio.folder / "pid").exists() and (studio.folder / "pid").read_text())
    pool.close()
    pool.close()
    with pytest.raises(RunStoppedError, match="closed"):
        running.result(timeout=120)
    with pytest.raises(CancelledError):
        waiting.result(timeout=120)
    assert eventually(lambda: not is_alive(int((studio.folder / "pid").read_text())))
    with pytest.raises(RunStoppedError, match="closed"):
        pool.submit(studio.job(clip_file))


def test_children_die_with_their_parent_even_while_they_hang(studio, clip_file) -> None:
    """The parent is killed without warning; nothing closes the pool."""
    script = f"""
        from pathlib import Path
        from featurestore.clips import Clip
        from pipeline.decode.sampling import DecodeJob
        from pipeline.decode.pool import DecodePool
        from pipeline.views import ResizeRule, View
        clip = Clip(dataset="d", path="a.mp4", kind="video")
        views = (View(rule=ResizeRule(), num_frames=16),)
        job = DecodeJob(root={str(studio.folder)!r}, clip=clip, views=views, decoder="write_pid_and_spin")
        DecodePool(1, worker_command={HOSTILE!r}).submit(job).result()
    """
    parent = subprocess.Popen([sys.executable, "-P", "-c", textwrap.dedent(script)])
    try:
        assert eventually(lambda: (studio.folder / "pid").exists() and (studio.folder / "pid").read_text())
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert eventually(lambda: not is_alive(int((studio.folder / "pid").read_text())))


def test_a_folder_named_pipeline_where_the_user_stands_is_not_imported(studio, clip_file, monkeypatch) -> None:
    for name in ("pipeline", "featurestore"):
        (studio.folder / name).mkdir()
        (studio.folder / name / "__init__.py").write_text("raise SystemExit('the wrong package was imported')")
    monkeypatch.chdir(studio.folder)
    with DecodePool(1) as pool:
        assert studio.numbers(pool.submit(studio.job(clip_file)).result())[-1] == 59


def test_decode_processes_do_not_import_torch_or_zarr() -> None:
    script = """
        import sys, pipeline.decode.worker, pipeline.decode.pyav, pipeline.decode.pool
        print(sorted({"torch", "transformers", "zarr", "distributed"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_side_of_the_driver_does_not_load_ffmpegs_libraries() -> None:
    script = "import sys, pipeline.decode.pool; print('av' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_pool_without_processes_or_time_is_refused() -> None:
    with pytest.raises(UserError, match="needs processes and time"):
        DecodePool(0)
    with pytest.raises(UserError, match="needs processes and time"):
        DecodePool(1, timeout_s=0)
