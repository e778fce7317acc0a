"""Blocks of one worker overlap, and each one's batches and errors stay its own."""

from __future__ import annotations

import threading

import pytest

from featurestore.writer import StoreWriter
from jobs.clusters import connect
from jobs.run import Task, run_tasks
from jobs.settings import ClusterRequest
from mervcache.errors import RunStoppedError
from pipeline.worker.block import extract_block
from pipeline.worker.engine import close_engines, engine_for
from pipeline.worker.isolate import compute_block

ONE = ("siglip",)


def test_a_worker_with_one_task_thread_holds_several_blocks(lab, monkeypatch):
    """Three blocks are computed at once, or none of them gets past the barrier."""
    *_, tasks = lab.plan(encoders=ONE)
    barrier = threading.Barrier(3, timeout=60)

    def meet(task):
        barrier.wait()
        return task.block

    monkeypatch.setattr("pipeline.worker.isolate.extract_block", meet)
    keyed = [Task(key=f"block-{number}", arguments=(task,)) for number, task in enumerate(tasks[:3])]
    with connect(ClusterRequest()) as client:
        outcomes = list(run_tasks(client, compute_block, keyed, attempts=1, per_worker=3))
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert sorted(outcome.result for outcome in outcomes) == sorted(task.block for task in tasks[:3])


def test_blocks_at_once_write_the_bytes_of_blocks_in_turn(lab, extracted):
    """Batches never span blocks, whichever order they are encoded in."""
    *_, tasks = lab.plan()
    threads = [threading.Thread(target=compute_block, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found, expected = (lab.hashes(place, ("video", "image", "receipts")) for place in (lab.store, extracted.store))
    written = [name for name in expected if name.startswith("receipts/") or "/c/" in name]
    assert len(written) == 2 * 4 * len(tasks)  # a shard and a receipt of each encoder
    assert {name: found.get(name) for name in written} == {name: expected[name] for name in written}


def test_a_block_that_fails_leaves_the_others_and_the_worker_alone(lab, monkeypatch):
    *_, tasks = lab.plan(encoders=ONE)
    engine = engine_for(tasks[0].engine)
    submit = engine.pool.submit

    def refuse_the_first_block(job):
        if job.clip == tasks[0].rows[2][1]:
            raise RunStoppedError("its share hangs")
        return submit(job)

    monkeypatch.setattr(engine.pool, "submit", refuse_the_first_block)
    errors = []

    def compute_first() -> None:
        try:
            compute_block(tasks[0])
        except RunStoppedError as error:
            errors.append(str(error))

    first = threading.Thread(target=compute_first)
    first.start()
    report = compute_block(tasks[1])
    first.join()
    assert errors == ["its share hangs"]
    assert (report.block, report.failed) == (tasks[1].block, 0)
    monkeypatch.undo()
    group = StoreWriter.open(lab.store).open_group("video", tasks[0].groups["siglip"])
    assert tasks[0].block not in group.committed_blocks()
    assert compute_block(tasks[0]).clips == 4


def test_a_block_of_a_closed_engine_stops_the_run(lab, monkeypatch):
    *_, tasks = lab.plan(encoders=ONE)
    engine = engine_for(tasks[0].engine)
    submit = engine.pool.submit

    def close_meanwhile(job):
        future = submit(job)
        engine.pool.close()
        return future

    monkeypatch.setattr(engine.pool, "submit", close_meanwhile)
    with pytest.raises(RunStoppedError, match="closed"):
        extract_block(tasks[0])
    close_engines()
