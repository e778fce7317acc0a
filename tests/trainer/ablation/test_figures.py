"""Places and values that the figures of a report draw, computed by hand."""

from __future__ import annotations

import re

import pytest

from trainer.ablation.document import Estimate
from trainer.ablation.figures import Costed, Score, cost_plot, lattice, score_rows, short
from trainer.ablation.plots import Curve, Scale, curves, scale_of, smooth


def score(subset, value, *, low=None, high=None, block="retrained", setting=""):
    cell = None if value is None else Estimate(value=value, low=low, high=high)
    return Score(block=block, method=block, setting=setting, subset=tuple(subset), seeds="0", estimate=cell)


def test_places_on_a_linear_and_a_logarithmic_axis():
    assert Scale(low=20, high=60).percent(30) == "25.00%"
    assert Scale(low=1, high=100, is_log=True).percent(10) == "50.00%"
    assert Scale(low=0, high=1).ticks == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert Scale(low=0.9, high=100, is_log=True).ticks == [1, 5, 20, 100]
    assert scale_of([1.0, 7.0], log=True).is_log is False
    assert scale_of([1.0, 9.0], log=True).is_log is True
    assert scale_of([0.0, 9.0], log=True).is_log is False  # 0 has no logarithm


@pytest.mark.parametrize("values", [[0.5], [0.0], [0.0, 0.0], [1e-9, 1e9]])
def test_an_axis_holds_its_values_also_where_they_are_one(values):
    scale = scale_of(values, log=True)
    assert all(0 <= scale(value) <= 1 for value in values)
    assert scale.ticks


def test_a_mean_leaves_out_what_is_not_finite_and_a_stretch_of_it_is_a_gap():
    points = [(step, None if step in (1, 80, 81) else float(step)) for step in range(82)]
    found = smooth(points)  # 82 points in stretches of 3
    assert found[0] == (1.0, 1.0)  # of steps 0 and 2
    assert found[1] == (4.0, 4.0)
    assert found[-2:] == [(79.0, 78.5), (81.0, None)]
    drawn = curves(
        [Curve(name="a", kind="e0", points=[(0, 4.0), (1, 3.0), (2, None), (3, 2.0), (4, 2.0)])],
        label="loss",
        x_name="step",
        y_text="{:g}".format,
    )
    assert drawn.count("<polyline") == 2
    assert "points='0.00," in drawn
    assert "100.00," in drawn


def test_the_pareto_front_is_numbered_by_cost_and_ties_share_a_number():
    values = {"a": (1, 0.3), "b": (2, 0.2), "c": (2, 0.5), "d": (4, 0.5), "e": (8, 0.6), "f": (8, 0.6)}
    scores = {name: score(name, value) for name, (_, value) in values.items()}
    points = [Costed(score=scores[name], cost=cost) for name, (cost, _) in values.items()]
    plot, numbers = cost_plot(points, unit="visual tokens", without=[score("", 0.25)])
    # b costs as much as c and is worse, d costs more than c and is no better.
    assert numbers == {scores["a"]: "1", scores["c"]: "2", scores["e"]: "3", scores["f"]: "3"}
    assert re.findall(r">(\d)</text><title>", plot) == ["1", "2", "3", "3"]
    assert "text-only" in plot
    assert plot.count("class='front'") == 4  # two steps, across and up


def test_lattice_has_an_edge_per_encoder_that_is_added_and_says_what_it_changes():
    values = {"": 0.25, "a": 0.5, "b": 0.2, "ab": 0.45}
    drawn = lattice([score(subset, value) for subset, value in values.items()], ("a", "b"))
    edges = re.findall(r"class='(up|down)'[^>]*><title>(.*?)</title>", drawn)
    assert sorted(edges) == [
        ("down", "a + b: -5.0 points"),
        ("down", "text-only + b: -5.0 points"),
        ("up", "b + a: +25.0 points"),
        ("up", "text-only + a: +25.0 points"),
    ]
    partial = lattice([score("", 0.25), score("a", 0.5), score("b", None)], ("a", "b"))
    assert "a+b: no answers" in partial
    assert "b: no answers" in partial
    assert len(re.findall("class='(?:up|down)'", partial)) == 1


def test_a_lattice_that_cannot_be_read_is_not_drawn():
    assert "Not drawn: 256 subsets of 8 encoders" in lattice([score("a", 0.5)], tuple("abcdefgh"))
    assert "<svg" in lattice([score("a", 0.5)], tuple("abcdef"))


def test_an_interval_of_few_seeds_is_drawn_within_what_an_accuracy_can_be():
    drawn = score_rows([score("a", 0.5, low=-0.7, high=1.7)], ("a",), chance=0.25, others={})
    assert "50.0 [-70.0, 170.0]" in drawn  # what was computed
    x = scale_of([0.25, 0.0, 1.0, 0.5])
    assert f"x1='{x.percent(0)}' y1='12.0' x2='{x.percent(1)}'" in drawn


def test_large_numbers_are_short():
    assert [short(value) for value in (64, 830_000, 7.4e7, 1.5e12)] == ["64", "830k", "74M", "1.5T"]
