"""Counters of the work at a worker's own endpoint, read as Prometheus reads it."""

import urllib.request
from html.parser import HTMLParser

from jobs import metrics
from jobs.clusters import ClusterRequest, connect
from jobs.metrics import dashboard_lines, performance_report


def test_what_a_task_counts_stands_at_its_workers_endpoint_beside_dasks_own():
    with connect(ClusterRequest()) as client:
        for stage, seconds in (("decode", 1.5), ("encode", 2.0), ("decode", 0.25)):
            client.submit(metrics.count, "test_seconds", "Seconds, by stage", seconds, pure=False, stage=stage).result()
        (worker,) = client.scheduler_info(n_workers=-1)["workers"].values()
        address = f"http://127.0.0.1:{worker['services']['dashboard']}/metrics"
        with urllib.request.urlopen(address, timeout=120) as answer:
            lines = answer.read().decode().splitlines()
    assert 'merv_test_seconds_total{stage="decode"} 1.75' in lines
    assert 'merv_test_seconds_total{stage="encode"} 2.0' in lines
    assert "# HELP merv_test_seconds_total Seconds, by stage" in lines
    assert any(line.startswith("dask_worker_threads") for line in lines)
    assert metrics.total("test_seconds", stage="decode") == 1.75  # the worker lived in this process
    assert metrics.total("never_counted") == 0


def test_a_run_with_a_dashboard_reports_how_to_reach_it_and_leaves_its_report(tmp_path, caplog):
    with connect(ClusterRequest(dashboard=True)) as client:
        first, hint, scrape = dashboard_lines(client)
        with performance_report(tmp_path / "new" / "report.html"):
            assert client.submit(abs, -1).result() == 1
        port = first.removesuffix("/status").rpartition(":")[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=120) as page:
            assert page.status == 200
    assert f"ssh -N -L {port}:" in hint
    assert hint.endswith(f"http://localhost:{port}/status")
    assert f":{port}/metrics" in scrape
    assert not [record for record in caplog.records if record.name == "jobs.metrics"]
    page = (tmp_path / "new" / "report.html").read_text()
    assert "<title>Dask Performance Report</title>" in page
    assert loaded_by(page) == []
    assert len(page) > 1_000_000  # Bokeh's own scripts are in it


def loaded_by(page: str) -> list[str]:
    """Addresses of scripts, styles, pictures and frames that a browser fetches for a page."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend(value for name, value in attrs if name == "src" or (tag == "link" and name == "href"))

    Parser().feed(page)
    return found


def test_a_report_that_cannot_be_made_costs_the_run_nothing(tmp_path, caplog):
    with connect(ClusterRequest()) as client, performance_report(tmp_path / "report.html"):
        (tmp_path / "report.html").mkdir()  # nothing can be written there
        assert client.submit(abs, -1).result() == 1
    (message,) = [record.message for record in caplog.records if record.name == "jobs.metrics"]
    assert message.startswith("no performance report: ")
