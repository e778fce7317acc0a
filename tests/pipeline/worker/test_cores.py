"""A worker's cores: affinity, the quotas of its cgroups, and its share beside other workers."""

from __future__ import annotations

import math
import os

import pytest

from pipeline.worker.cores import cgroup_cores, free_cores, sharing_workers
from pipeline.worker.engine import default_decoders


@pytest.fixture
def cgroups(tmp_path):
    """Make the cgroup files of a process: its line in /proc/self/cgroup, and files under the root."""

    def make(line: str, files: dict[str, str]) -> float:
        process = tmp_path / "cgroup"
        process.write_text(line)
        for name, content in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return cgroup_cores(process, tmp_path / "root")

    return make


def test_the_smallest_quota_from_the_process_up_to_the_root_counts(cgroups):
    files = {
        "job/step/cpu.max": "max 100000\n",
        "job/cpu.max": "1250000 100000\n",
        "cpu.max": "9000000 100000\n",
        "other/cpu.max": "100000 100000\n",
    }
    assert cgroups("0::/job/step\n", files) == 12.5


def test_quotas_of_the_first_version_are_read_too(cgroups):
    files = {"cpu/job/cpu.cfs_quota_us": "400000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}
    assert cgroups("5:memory:/job\n4:cpu,cpuacct:/job\n", files | {"cpu/cpu.cfs_quota_us": "-1\n"}) == 4.0


@pytest.mark.parametrize("line", ["0::/job\n", "", "nonsense\n"])
def test_without_a_quota_there_is_no_limit(line, cgroups):
    assert cgroups(line, {}) == math.inf


def test_a_process_has_its_share_of_its_affinity_and_no_cap():
    before = os.sched_getaffinity(0)
    assert free_cores() <= len(before)
    assert free_cores(10_000) == 1
    os.sched_setaffinity(0, {min(before)})
    try:
        assert free_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_gpu_worker_decodes_on_all_its_cores_and_a_cpu_worker_leaves_one_to_its_encoders():
    assert default_decoders("cuda:0", 24) == 24
    assert default_decoders("cpu", 24) == 23
    assert default_decoders("cpu", 1) == 1


def test_workers_of_a_host_share_its_cores():
    from jobs.clusters import connect
    from jobs.settings import ClusterRequest

    assert sharing_workers() == 1
    with connect(ClusterRequest(num_workers=2)) as client:
        seen = client.map(lambda _: sharing_workers(), range(2), pure=False)
        assert client.gather(seen) == [2, 2]
