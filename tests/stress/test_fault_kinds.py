"""Every kind of fault that `faults.py` makes, once; kills and full disks have tests of their own."""

from __future__ import annotations

import random

import pytest

from tests.stress import faults

pytestmark = pytest.mark.slow

KINDS = [
    "decode process stopped",
    "scheduler killed",
    "store read-only",
    "media unmounted",
    "media file removed",
    "poisonous file",
    "poisonous clip",
    "poisonous clip, 2 workers",
    "two drivers",
    "credentials expired",
]


@pytest.fixture(scope="module")
def fault_lab(tmp_path_factory):
    lab = faults.FaultLab(tmp_path_factory.mktemp("faults") / "lab")
    yield lab
    lab.close()


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_fault_the_same_command_ends_with_an_undisturbed_store(kind, fault_lab):
    try:
        faults.FAULTS[kind](fault_lab, random.Random(0))
    except faults.CannotBeMade as reason:
        pytest.skip(str(reason))
