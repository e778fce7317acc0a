"""Predicted and actual cost, side by side in the store."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from featurestore import FeatureStore
from mervcache.errors import UserError
from pipeline.cli.extract import main
from pipeline.forecast import forecast
from pipeline.report import write_report
from pipeline.status import store_status
from pipeline.summary import Prediction, hours_text, predict_from_first_blocks, read_forecast


def test_the_pace_of_the_first_blocks_is_that_of_the_whole_run():
    early = predict_from_first_blocks(done=10, total=200, seconds=30.0, num_bytes=1000)
    assert early == Prediction(
        by="its first 10 clips", clips=200, seconds=600.0, interval_s=None, bytes=20000, worker_s=0.0
    )


def test_workers_time_grows_with_the_clips_and_loading_does_not():
    counts = {"done": 10, "total": 200, "seconds": 30.0, "num_bytes": 1000}
    early = predict_from_first_blocks(**counts, worker_s=130.0, loading_s=100.0)
    assert early.worker_s == 100.0 + 30.0 * 20


def test_hours_are_named_after_what_a_worker_holds():
    assert hours_text(44280.0, "cuda:0", 2.5) == "12.30 GPU-hours, cost 30.75 at 2.5 an hour"
    assert hours_text(36.0, "cpu") == "0.0100 worker-hours"


@pytest.mark.parametrize("price", [-1.0, float("inf")])
def test_a_price_is_a_finite_number(lab, price):
    with pytest.raises(UserError, match="gpu_cost is the price of an hour"):
        lab.config(gpu_cost=price)


@pytest.mark.parametrize("done", [0, 9, 200])
def test_before_a_twentieth_and_after_the_end_there_is_nothing_to_predict(done):
    assert predict_from_first_blocks(done=done, total=200, seconds=30.0, num_bytes=1000) is None


def test_a_file_that_is_no_plan_is_refused_with_the_command_that_makes_one(tmp_path):
    (tmp_path / "plan.json").write_text('{"rows": 3}')
    with pytest.raises(UserError, match="save one with `merv-pipeline plan --json > "):
        read_forecast(tmp_path / "plan.json")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_forecast(tmp_path / "none.json")


def test_a_plan_made_on_a_cluster_stands_beside_what_the_run_took(lab):
    """The probe runs on the cluster's worker; the journal, `status` and the report tell both."""
    from distributed import LocalCluster

    plan_file = lab.folder / "plan.json"
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        seen = []
        cluster.scheduler.add_plugin(_tasks_of(seen), name="seen")
        plan = forecast(lab.config(encoders=["siglip"], scheduler=cluster.scheduler_address, gpu_cost=2.0), probe=3)
    assert any("probe_clips" in key for key in seen)
    low, high = plan.interval_s
    assert 0 <= low <= plan.seconds <= high
    assert plan.worker_s == pytest.approx(plan.seconds)  # one worker
    plan_file.write_text(json.dumps(plan.to_dict()))
    summary = lab.extract(encoders=["siglip"], forecast=str(plan_file), gpu_cost=3600.0)
    assert summary.predicted["by"] == "plan"
    assert (summary.predicted["clips"], summary.clips) == (14, 14)
    assert abs(summary.predicted["bytes"] - summary.bytes) < 0.1 * summary.bytes
    run = store_status(lab.store)["last run"]
    assert run["predicted"]["seconds"] == pytest.approx(plan.seconds - plan.startup_s)
    assert run["seconds"] == summary.elapsed_s
    assert FeatureStore.open(lab.store).runs()[-1]["summary"]["startup_s"] == summary.startup_s > 0
    assert run["predicted"]["worker_s"] == pytest.approx(plan.worker_s)
    assert run["worker_s"] == summary.worker_s > 0.9 * summary.elapsed_s  # one worker, held also while it loads
    (spent,) = store_status(lab.store)["spent"]
    assert spent == {"device": "cpu", "runs": 1, "worker_s": summary.worker_s, "cost": pytest.approx(summary.worker_s)}
    (_, record), *_ = FeatureStore.open(lab.store).journal()
    assert record["summary"]["predicted"]["bytes"] == plan.bytes
    lines = CliRunner().invoke(main, ["status", str(lab.store)]).output.splitlines()
    assert any(line.startswith("last run: ") and line.endswith("for 14 clips") for line in lines)
    assert any(line.startswith("predicted: ") and line.endswith("for 14 clips, by plan") for line in lines)
    assert "for 14 clips, by plan" in write_report(lab.store, out=lab.folder / "report.html").read_text()


def test_without_a_plan_a_run_predicts_itself_from_its_first_block(extracted):
    predicted = extracted.summary.predicted
    assert re.fullmatch(r"its first \d+ clips", predicted["by"])  # blocks finish in any order
    assert predicted["clips"] == 14
    assert predicted["bytes"] > 0


def _tasks_of(seen):
    from distributed import SchedulerPlugin

    class Tasks(SchedulerPlugin):
        def transition(self, key, start, finish, *args, **kwargs):
            seen.append(str(key))

    return Tasks()


def test_a_plan_s_seconds_are_those_of_a_run_whose_encoders_are_loaded(tmp_path):
    rows = [{"stage": "-", "kind": "video", "to_do": 4}]
    plan = {"rows": rows, "seconds": 100.0, "interval_s": [90.0, 110.0], "startup_s": 85.0, "bytes": 7}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    predicted = read_forecast(tmp_path / "plan.json")
    assert (predicted.seconds, predicted.interval_s) == (15.0, (5.0, 25.0))
