"""The simulation's arithmetic: what is busy, and which stage is the scarcest."""

from __future__ import annotations

import pytest

from benchmarks.simulated_engine import Seen
from benchmarks.simulated_gpu import CASES, Case, row, steady_share
from pipeline.worker.reports import DECODING, BlockReport

CLIPS = 160


def seen(decoding_s: float, charged_s: float) -> Seen:
    """A worker whose GPU computed for half of the time."""
    report = BlockReport(
        kind="video",
        block=0,
        clips=CLIPS,
        failed=0,
        frames=0,
        bytes=0,
        halvings=0,
        reused=0,
        seconds={DECODING: decoding_s},
        made={},
        reasons={},
    )
    forwards = [(float(n), n + 0.5) for n in range(20)]
    return Seen(forwards=forwards, charged={"compress": charged_s}, python_s=1.0, reports=[report])


def test_busy_is_taken_between_two_forwards_of_the_middle():
    warming_up, draining = [(0.0, 1.0), (9.0, 10.0), (19.0, 20.0)], [(34.0, 35.0), (50.0, 51.0), (99.0, 100.0)]
    steady = [(30.0 + n, 30.75 + n) for n in range(4)]
    assert steady_share([*draining, *steady, *warming_up]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("decoding_s", "charged_s", "scarcest", "rate"),
    [
        (0.01, 0.01, "gpu", 1 / 0.017),
        (CLIPS * 0.2, 0.0, "decoders", 8 / 0.2),
        (CLIPS * 0.2, CLIPS * 0.2, "cores", 8 / 0.4),
    ],
)
def test_the_limit_is_what_the_scarcest_stage_allows(decoding_s, charged_s, scarcest, rate):
    case = Case(encoders=4, kind="video", decoders=8, workers=1)
    found = row(case, 10.0, [seen(decoding_s, charged_s)])
    assert (found["scarcest"], found["busy"]) == (scarcest, 0.5)
    assert found["limit"] == pytest.approx(rate * 0.017, abs=1e-3)
    assert found["of_limit"] == pytest.approx(0.5 / (rate * 0.017), abs=1e-3)


def test_every_case_of_the_table_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES) == 36
