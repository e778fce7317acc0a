"""Several grids and layers of one encoder in one run: forwards are shared, bytes are those of separate runs."""

from __future__ import annotations

import json

import pytest

from featurestore import FeatureStore
from featurestore.transfer.merge import StoreCells, combine
from featurestore.transfer.selection import Selection
from mervcache.errors import IdentityConflictError, UserError
from pipeline.cli.next_step import train_command
from pipeline.config import ExtractConfig
from pipeline.explain import explain
from pipeline.forecast import forecast
from pipeline.parity import check_parity
from pipeline.quarantine import quarantined
from pipeline.status import inspect_store, store_status
from pipeline.vectors import pool_store
from pipeline.worker.block import extract_block
from pipeline.worker.engine import close_engines, engine_for

GRIDS = ("4x4", "8x2x2", "raw")
ONE = ("dinov2",)


def bytes_by_identity(lab, folder):
    """Group -> file -> digest of its shards and receipts."""
    found = {}
    for name, digest in lab.hashes(folder, ("video", "image", "receipts")).items():
        group = next((part for part in name.split("/") if "-" in part), None)
        found.setdefault(group, {})[name] = digest
    found.pop(None, None)
    return found


def test_grids_of_one_run_have_the_ids_and_bytes_of_separate_runs(lab):
    together = lab.folder / "together.zarr"
    summary = lab.extract(encoders=ONE, grid=",".join(GRIDS), store=together)
    made = bytes_by_identity(lab, together)
    assert len(made) == len(GRIDS)
    for number, grid in enumerate(GRIDS):
        alone = lab.folder / f"{number}.zarr"
        lab.extract(encoders=ONE, grid=grid, store=alone)
        ((group, files),) = bytes_by_identity(lab, alone).items()
        assert made[group] == files
    store = FeatureStore.open(together)
    assert sorted(key.partition("@")[0] for key in store.encoders) == ["dinov2"] * 3
    assert all(len(key.partition("@")[2]) == 6 for key in store.encoders)
    assert {identity.grid for identity in store.encoders.values()} == {(16, 4, 4), (8, 2, 2)}
    assert {identity.pooling for identity in store.encoders.values()} == {"none", "adaptive-avg"}
    words = train_command(summary).split()
    assert store.encoders[words[words.index("--encoders") + 1]].grid == (16, 4, 4)


def test_layers_and_grids_of_several_encoders_equal_separate_runs(lab):
    together = lab.folder / "together.zarr"
    settings = {"encoders": ("dinov2", "vivit"), "prefix_tokens": True, "grid": [8, 2, 2]}
    layers, grids = {"dinov2": ["1", "-1+norm"], "vivit": [1]}, {"dinov2": ["2x2", "raw"]}
    lab.extract(**settings, store=together, layers=layers, grids=grids)
    made = bytes_by_identity(lab, together)
    assert len(made) == 5
    for number, (layer, grid) in enumerate((layer, grid) for layer in ("1", "-1+norm") for grid in ("2x2", "raw")):
        alone = lab.folder / f"{number}.zarr"
        given = {"layers": {"dinov2": layer}, "grids": {"dinov2": grid}}
        lab.extract(**settings | {"encoders": ("dinov2",)}, store=alone, **given)
        ((group, files),) = bytes_by_identity(lab, alone).items()
        assert made[group] == files


def test_a_forward_runs_once_for_all_grids_and_layers_of_a_batch(lab):
    counts = {}
    for name, changes in {
        "one": {},
        "grids": {"grid": "4x4,2x2,raw"},
        "layers": {"grid": "4x4,raw", "layers": {"dinov2": "1,2"}},
    }.items():
        *_, tasks = lab.plan(encoders=ONE, store=lab.folder / f"{name}.zarr", **changes)
        engine, runs = engine_for(tasks[0].engine), []
        assert len(engine.forwards) == 1
        first = next(iter(engine.encoders.values())).loaded.network
        first.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        report = extract_block(tasks[0])
        counts[name] = (len(runs), len(report.made), report.clips)
        close_engines()
    assert counts == {"one": (2, 1, 4), "grids": (2, 3, 4), "layers": (2, 4, 4)}  # 4 clips, 2 in a batch


def test_a_run_resumes_and_grids_are_added_to_a_store_that_has_some(lab):
    first = lab.extract(encoders=ONE, grid="4x4,2x2")
    assert first.clips == len(lab.VIDEOS) + len(lab.IMAGES)
    assert lab.extract(encoders=ONE, grid="4x4,2x2").clips == 0
    before = lab.hashes(lab.store, ("video", "image", "receipts"))
    more = lab.extract(encoders=ONE, grid="4x4,2x2,raw")
    assert more.clips == first.clips
    assert {name.partition("/")[2] for name in more.made} == {"dinov2@raw"}
    after = lab.hashes(lab.store, ("video", "image", "receipts"))
    assert before.items() <= after.items()
    assert lab.extract(encoders=ONE, grid="2x2").clips == 0  # a stored one by itself
    with pytest.raises(IdentityConflictError, match="--new-identity to keep both"):
        lab.extract(encoders=ONE, grid="3x3,1x1")
    with pytest.raises(IdentityConflictError, match="weights_sha256"):
        lab.extract(encoders=ONE, grid="4x4,2x2", weights="random:1")


def test_the_plan_prices_one_forward(lab, monkeypatch):
    from pipeline.encoders.loading import Encoder

    whole, runs = Encoder.encode_layers, []

    def counted(self, *arguments, **options):
        runs.append(1)
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Encoder, "encode_layers", counted)
    for grid, rows in (("4x4", 1), ("4x4,2x2,raw", 3)):
        runs.clear()
        config = lab.config(encoders=ONE, grid=grid, stage="finetune", kind="video", store=lab.folder / "none.zarr")
        result = forecast(config, probe=2)
        assert (len(result.rows), len(runs)) == (rows, 1)
        assert [row.forwards for row in result.rows] == [9, 0, 0][:rows]
        assert [row.is_shared for row in result.rows] == [False, True, True][:rows]
        assert sum(row.bytes for row in result.rows) > 0
        close_engines()


def test_the_time_of_a_shared_forward_is_the_same_in_plan_and_explain(lab):
    lab.extract(encoders=ONE, grid="4x4", kind="video", limit=2)
    grids = {"encoders": ONE, "grid": "4x4,2x2,raw", "kind": "video"}
    rows = forecast(lab.config(**grids), probe=1).rows
    counts = {"dinov2@16x4x4": (7, 7), "dinov2@16x2x2": (9, 2), "dinov2@raw": (9, 0)}  # to do, forwards
    by_encoder = {name: [row for row in rows if row.encoder == name] for name in counts}
    assert {n: (sum(r.to_do for r in of), sum(r.forwards for r in of)) for n, of in by_encoder.items()} == counts
    for probe in (0, 1):
        found = explain(lab.store, lab.config(**grids), probe=probe)
        costs = {change.encoder: change.costs[0] for change in found.encoders}
        assert {name: (cost.clips, cost.forwards) for name, cost in costs.items()} == counts
    (one,) = explain(lab.store, lab.config(encoders=ONE, grid="2x2", kind="video")).encoders
    past = explain(lab.store, lab.config(**grids))
    # nine clips need a forward each, whatever the number of grids
    assert sum(change.costs[0].seconds for change in past.encoders) == pytest.approx(one.costs[0].seconds)


def test_settings_of_a_run_survive_a_file_and_the_journal(lab):
    config = lab.config(encoders=("dinov2", "siglip"), grid="16x4x4,raw", layers={"dinov2": [-1, "1+norm"]})
    assert [settings.key for settings in config.encoder_settings] == [
        "dinov2@16x4x4@layer-1",
        "dinov2@raw@layer-1",
        "dinov2@16x4x4@layer1+norm",
        "dinov2@raw@layer1+norm",
        "siglip@16x4x4",
        "siglip@raw",
    ]
    assert ExtractConfig(**config.to_dict()) == config
    assert ExtractConfig(**json.loads(json.dumps(config.to_dict()))) == config
    path = lab.folder / "config.yaml"
    path.write_text(config.to_yaml())
    from pipeline.config import read_config

    assert read_config(path, {}).encoder_settings == config.encoder_settings
    one = read_config(path, {"grid": "8,4,4", "layers": {"dinov2": "1"}})
    assert [(settings.key, settings.grid) for settings in one.encoder_settings] == [
        ("dinov2", (8, 4, 4)),
        ("siglip", (8, 4, 4)),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": "16x4x4,4x4"}, r"dinov2 is asked for twice: .*grid 16x4x4"),
        ({"layers": {"dinov2": "2,-1"}}, r"dinov2 is asked for twice: output of block 2 of 2"),
        ({"layers": {"dinov2": "3"}}, "it has 2 blocks"),
        ({"grids": {"dinov2": "4x4x4x4"}}, "a grid is TxHxW"),
        ({"grids": {"dinov": "4x4"}}, "unknown encoder 'dinov'"),
        ({"grid": "4x4,8x8"}, "grid 16x8x8 is finer than the 16x4x4 of dinov2"),
    ],
)
def test_grids_and_layers_that_cannot_be_are_refused(changes, message, lab):
    with pytest.raises(UserError, match=message):
        lab.extract(encoders=ONE, **changes)


def test_every_command_takes_an_encoder_by_its_grid_or_its_id(lab):
    (lab.copy_of_root() / "llava_image_tune/coco/0.png").write_bytes(b"no picture")
    lab.extract(encoders=ONE, grid="4x4,2x2", kind="image", canaries=True)
    store = FeatureStore.open(lab.store)
    keys = ["dinov2@16x2x2", "dinov2@16x4x4"]
    assert sorted(store.encoders) == sorted(entry["encoder"] for entry in store_status(lab.store)["encoders"]) == keys
    coarse = store.encoders[keys[0]]
    for name in (keys[0], f"dinov2@{coarse.id[:6]}"):
        assert inspect_store(lab.store, name)["id"] == coarse.id
        assert {row.encoder for row in check_parity(lab.store, encoders=[name]).rows} == {keys[0]}
        assert {row["encoder"] for row in quarantined(lab.store, encoder=name)} == {keys[0]}
        assert pool_store(store, [name]).column_names == pool_store(store, [keys[0]]).column_names
        part = lab.folder / f"{name}.zarr"
        combine([StoreCells(lab.store)], part, selection=Selection(encoders=(name,)))
        assert list(FeatureStore.open(part).encoders.values()) == [coarse]
        assert FeatureStore.open(part).encoder_key(name) == "dinov2"
    for name in ("dinov2@16x8x8", "dinov2@000000"):
        for use in (
            lambda name: inspect_store(lab.store, name),
            lambda name: check_parity(lab.store, encoders=[name]),
            lambda name: quarantined(lab.store, encoder=name),
            lambda name: pool_store(store, [name]),
            lambda name: combine([StoreCells(lab.store)], lab.folder / "x.zarr", selection=Selection(encoders=(name,))),
        ):
            with pytest.raises(UserError, match="dinov2@16x2x2"):
                use(name)


def test_status_training_and_repair_know_each_identity_by_its_key(lab, monkeypatch):
    from pipeline.cli import render
    from pipeline.encoders.loading import Encoder
    from pipeline.recompute import Recompute

    whole, runs = Encoder.encode_layers, []

    def counted(self, *arguments, **options):
        runs.append(1)
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Encoder, "encode_layers", counted)
    lab.extract(encoders=ONE, kind="image", limit=4, grid="4x4,raw", layers={"dinov2": "1,2"}, canaries=True)
    assert len(runs) == 1 + 2  # a reference clip, and four stills in batches of two
    status = store_status(lab.store)
    keys = {entry["encoder"]: (tuple(entry["grid"]), entry["layer"]) for entry in status["encoders"]}
    assert sorted(layer for _, layer in keys.values()) == ["1", "1", "2", "2"]
    render.status(status, [])
    assert {row.verdict for row in check_parity(lab.store).rows} == {"equal"}
    from featurestore.writer import StoreWriter

    writer = StoreWriter.open(lab.store)
    for name in writer.encoder_groups("image"):
        group = writer.open_group("image", name)
        receipt = group.receipt(0)
        again = Recompute(lab.store, root=str(lab.root), weights=None, device="cpu")(group, receipt)
        assert [row.digest for row in again.receipt.rows] == [row.digest for row in receipt.rows]
    with pytest.raises(UserError, match="under several identities; name one of: dinov2@"):
        inspect_store(lab.store, "dinov2")
