"""Templates for operators: alert rules, the Grafana board and the Containerfile."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import parse

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "jobs/templates"


def rules() -> list[dict]:
    (group,) = yaml.safe_load((TEMPLATES / "prometheus-rules.yaml").read_text())["groups"]
    return group["rules"]


def panels() -> list[dict]:
    return json.loads((TEMPLATES / "grafana-dashboard.json").read_text())["panels"]


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + [one["expr"] for panel in panels() for one in panel["targets"]]


def selectors(expression: str) -> Iterator[tuple[str, str, list[str]]]:
    """Metric, label and the values that the label must have, of an expression."""
    for name, matchers in re.findall(r"\b((?:merv|dask|process)_\w+)(\{[^}]*\})?", expression):
        pairs = re.findall(r'(\w+)!?=~?"([^"]*)"', matchers)
        yield name, "", []
        yield from ((name, label, values.split("|")) for label, values in pairs)


@pytest.fixture(scope="module")
def exposed(media_root, tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    """Labels of each sample, by metric, that scheduler and worker of a real run serve."""
    from distributed import LocalCluster

    from tests.pipeline.conftest import Lab

    lab = Lab(media_root, tmp_path_factory.mktemp("metrics"))
    found: dict[str, list[dict[str, str]]] = {}
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        lab.extract(encoders=["siglip"], limit=4, scheduler=cluster.scheduler_address)
        (worker,) = cluster.workers.values()
        for port in (cluster.scheduler.http_server.port, worker.http_server.port):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as answer:
                for family in text_string_to_metric_families(answer.read().decode()):
                    for sample in family.samples:
                        found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_rules_and_panels_use_metrics_and_labels_that_a_run_serves(exposed):
    used = {entry[0] for expression in expressions() for entry in selectors(expression)}
    assert used >= {"merv_clips_total", "merv_clips_failed_total", "merv_stage_seconds_total", "dask_scheduler_workers"}
    for expression in expressions():
        for name, label, values in selectors(expression):
            assert name in exposed, f"{expression}: no metric {name}"
            for value in values:
                assert value in {labels.get(label) for labels in exposed[name]}, f"{name} has no {label}={value}"


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_is_promql(expression):
    parse(expression)


def test_every_rule_names_an_entry_of_the_runbook():
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/runbook.md"
        assert anchor in anchors, rule["alert"]


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in panels()}) == len(panels())
    places = [panel["gridPos"] for panel in panels()]
    cells = {(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])}
    assert len(cells) == sum(place["w"] * place["h"] for place in places)
    assert max(x for x, _ in cells) < 24


def test_the_container_gets_every_package_and_file_that_it_builds_from():
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (TEMPLATES / "Containerfile").read_text(), re.MULTILINE)
    sources = {word for line in copied for word in line.split() if "[" not in word}
    assert all((ROOT / source).exists() for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]} <= sources
    assert set((ROOT / "MANIFEST.in").read_text().split()) - {"include"} <= sources


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint has no build for this machine")
def test_the_containerfile_has_no_lint():
    done = subprocess.run(["hadolint", str(TEMPLATES / "Containerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
