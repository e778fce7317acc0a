"""The cluster of this machine's GPUs, with fakes at the boundary to CUDA alone: the number of devices and their UUIDs.

Everything else is real: nannies, worker processes, and the environment that each was started with. No test here shows
that an encoder runs on a GPU.
"""

import importlib
import os
import sys
import types

import pytest

from jobs import clusters
from jobs.clusters import ClusterError, ClusterRequest, ClusterSettings, connect
from jobs.pin import pinned

pytestmark = pytest.mark.slow

FAKE_CUDA = """
import os
from jobs import clusters as gpus

def device_count():
    return len(gpus.visible_gpus()) if "CUDA_VISIBLE_DEVICES" in os.environ else 4

def device_uuid(device):
    '''GPUs 0 and 9 are one and the same.'''
    seen = gpus.visible_gpus()
    index = int(device.partition(":")[2] or 0)
    return f"GPU-{int(seen[index]) % 9}" if index < len(seen) else None
"""


@pytest.fixture
def fake_cuda(tmp_path, monkeypatch):
    """Four GPUs for this process, and for workers what their CUDA_VISIBLE_DEVICES says."""
    (tmp_path / "fake_cuda.py").write_text(FAKE_CUDA)  # worker processes cannot import the tests
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake = importlib.import_module("fake_cuda")
    monkeypatch.setattr(clusters, "device_count", fake.device_count)
    monkeypatch.setattr(clusters, "device_uuid", fake.device_uuid)
    monkeypatch.setitem(sys.modules, "dask_cuda", None)  # as if it could not be installed
    yield fake
    sys.modules.pop("fake_cuda", None)


def request(num_workers: int = 0, **settings) -> ClusterRequest:
    return ClusterRequest(scheduler="cuda", num_workers=num_workers, settings=ClusterSettings(**settings))


def test_with_fake_gpus_every_process_is_pinned_to_one_of_its_own(fake_cuda, caplog):
    caplog.set_level("INFO", "jobs")
    with connect(request(2)) as client:
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        threads = {entry["nthreads"] for entry in client.scheduler_info()["workers"].values()}
    assert (sorted(seen.values()), threads) == (["0", "1"], {1})
    (message,) = [record.message for record in caplog.records if record.name == "jobs.clusters"]
    assert message.startswith("dask-cuda is not installed: 2 worker processes, one pinned to each GPU")


def test_with_fake_gpus_tasks_of_two_processes_have_two_gpus_each(fake_cuda):
    with connect(ClusterRequest(scheduler="cuda", ranks=2)) as client:
        assert sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == ["0,1", "2,3"]
    with pytest.raises(ClusterError, match="3 workers of 2 processes wanted of the GPUs 0, 1, 2, 3"):
        connect(ClusterRequest(scheduler="cuda", num_workers=3, ranks=2)).__enter__()


def test_with_fake_gpus_two_workers_on_one_device_are_refused_by_its_uuid(fake_cuda):
    with pytest.raises(ClusterError, match=r"2 workers share the GPU GPU-0: tls://.*, tls://.*; give each its own"):
        connect(request(devices="0,9")).__enter__()


def test_with_fake_gpus_local_workers_that_would_share_one_are_refused(fake_cuda, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ClusterError, match="2 workers share the GPU GPU-0"):
        connect(ClusterRequest(num_workers=2)).__enter__()


def test_with_fake_gpus_dask_cuda_is_asked_for_one_process_per_gpu_where_it_is_there(fake_cuda, monkeypatch):
    """dask-cuda itself is a fake here: a local cluster that notes what it was asked for."""
    from distributed import LocalCluster

    asked = {}

    def fake_cluster(*, CUDA_VISIBLE_DEVICES, device_memory_limit, **options):
        asked.update(devices=CUDA_VISIBLE_DEVICES, device_memory_limit=device_memory_limit, **options)
        return LocalCluster(n_workers=1, **options)

    module = types.SimpleNamespace(LocalCUDACluster=fake_cluster)
    monkeypatch.setitem(sys.modules, "dask_cuda", module)
    monkeypatch.setattr(clusters, "device_uuid", lambda device: "GPU-0")
    with connect(request(devices="2,3")) as client:
        assert client.submit(abs, -2).result() == 2
    assert (asked["devices"], asked["threads_per_worker"]) == (["2", "3"], 1)
    assert (asked["memory_limit"], asked["device_memory_limit"]) == (None, None)


def test_a_machine_without_a_gpu_is_told_so_at_once(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ClusterError, match="found no GPU on this machine: check `nvidia-smi`"):
        connect(request()).__enter__()


def test_with_fake_gpus_more_workers_than_gpus_or_one_named_twice_is_refused(fake_cuda):
    with pytest.raises(ClusterError, match="5 workers wanted of the GPUs 0, 1, 2, 3"):
        connect(request(5)).__enter__()
    with pytest.raises(ClusterError, match="one worker each wanted of the GPUs 1, 1"):
        connect(request(devices="1, 1")).__enter__()


def test_visible_gpus_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 3")
    assert clusters.visible_gpus() == ["GPU-a", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert clusters.visible_gpus() == []


@pytest.mark.parametrize(
    ("name", "visible", "expected"),
    [
        ("node7-3", "4,5,6,7", {"CUDA_VISIBLE_DEVICES": "7"}),
        ("cluster-0-5", "0,1,2,3", {"CUDA_VISIBLE_DEVICES": "1"}),  # counted round
        ("cluster-2", "0", {}),  # SLURM gave it one already
        ("cluster-2", "", {}),
        ("worker", "0,1", {}),
    ],
)
def test_a_worker_takes_the_gpu_of_its_number_among_those_of_its_job(name, visible, expected):
    assert pinned(name, {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_where_no_gpus_are_named_a_worker_takes_one_of_the_machines():
    assert pinned("node7-2", {}, ["0", "1", "2", "3"]) == {"CUDA_VISIBLE_DEVICES": "2"}
    assert pinned("node7-2", {}, ["0"]) == {}
    assert pinned("node7-2", {"CUDA_VISIBLE_DEVICES": ""}, ["0", "1"]) == {}
