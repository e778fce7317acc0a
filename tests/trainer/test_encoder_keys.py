"""Runs and sweeps on a store that holds an encoder on several grids, and that has grown since."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from featurestore import Clip, FeatureStore
from mervcache.errors import UserError
from trainer.ablation.execute import open_sweep
from trainer.ablation.sweep import SweepConfig, add_to_record, read_sweep
from trainer.loop.train import train
from trainer.recipes import Stage
from trainer.runs.run_record import RunRecord, read_metrics
from trainer.sources import open_store, opened

FINE, COARSE = "dinov2@4x4x4", "dinov2@2x2x2"


@pytest.fixture
def identities(toy_identity):
    """Two grids of an encoder, and another layer at the second grid."""
    fine, coarse = (toy_identity("dinov2", grid=(size, size, size), width=4) for size in (4, 2))
    return {"fine": fine, "coarse": coarse, "deep": replace(coarse, layer="output of block 12 of 24")}


@pytest.fixture
def write(tmp_path, identities, write_store, make_sample):
    """Writes, or adds to, the store with these identities."""

    def write(*names):
        videos = [Clip(dataset="set", path=f"clip{index}.mp4", kind="video") for index in range(21)]
        random = np.random.default_rng(5)
        arrays = {
            (name, clip.clip_id): {
                "tokens": random.standard_normal((*identities[name].grid, 4)).astype(np.float16) + len(name)
            }
            for name in names
            for clip in videos
        }
        chosen = {name: identities[name] for name in names}
        writer = write_store(tmp_path / "grids.zarr", videos, chosen, arrays)
        writer.add_samples("toy", [make_sample(i, split="train" if i < 18 else "heldout") for i in range(21)])
        writer.publish_snapshot()
        return str(tmp_path / "grids.zarr")

    return write


def test_a_run_names_an_encoder_by_its_grid_or_its_id_and_keeps_the_name(write, identities, config, tmp_path):
    store, digits = write("fine", "coarse"), f"dinov2@{identities['coarse'].id[:6]}"
    assert sorted(FeatureStore.open(store).encoders) == [COARSE, FINE]
    for name in (COARSE, digits):
        chosen = replace(config, encoders=(name,), clips_with=(digits, FINE), max_steps=1)
        train(chosen, *open_store(store, chosen), tmp_path / name, store=store, quiet=True)
        shapes = RunRecord.read(tmp_path / name).shapes
        assert {label: shape.identity for label, shape in shapes.items()} == {name: identities["coarse"].id}
    assert read_metrics(tmp_path / COARSE)[0]["loss"] == read_metrics(tmp_path / digits)[0]["loss"]
    with pytest.raises(UserError, match=f"{COARSE}, {digits} are the same in this store"):
        open_store(store, replace(config, encoders=(COARSE, digits)))


def test_a_run_goes_on_with_its_identity_in_a_copy_where_its_name_has_become_ambiguous(
    write, identities, config, tmp_path
):
    chosen = replace(config, encoders=(COARSE,))
    store, out = write("fine", "coarse"), tmp_path / "run"
    train(replace(chosen, max_steps=2), *open_store(store, chosen), out, store=store, quiet=True)
    record = RunRecord.read(out)
    write("deep")
    shutil.rmtree(tmp_path / "grids.zarr" / "snapshots")  # a copy may hold its newest snapshot alone
    assert write("deep") == store
    assert FeatureStore.open(store).snapshot != record.snapshot
    with pytest.raises(UserError, match=f"'{COARSE}' is stored under several identities; name one of: dinov2@"):
        open_store(store, chosen)
    with opened(store) as open_tokens:
        _, source = open_tokens(chosen, out)
    assert {label: shape.identity for label, shape in source.shapes.items()} == {COARSE: identities["coarse"].id}


def test_a_sweep_takes_any_form_and_records_keys(write, identities, config, tmp_path):
    store, digits = write("fine", "coarse"), f"dinov2@{identities['coarse'].id[:6]}"
    axes = SweepConfig(encoders=(FINE, digits), subsets=("alone", f"{COARSE}+{FINE}"), text_only=False)
    sweep = open_sweep(axes, (Stage(name="finetune", config=config),), store, tmp_path / "sweep")
    assert sweep.encoders == (FINE, COARSE)
    assert [run.encoders for run in sweep.runs] == [(FINE,), (COARSE,), (FINE, COARSE)]
    add_to_record(sweep.out, sweep.pins, sweep.axes, sweep.runs, store=store)
    assert set(read_sweep(sweep.out)["runs"]) == {run.name for run in sweep.runs}
