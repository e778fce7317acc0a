"""The order of encoders: the paper's by default, the recorded one where a run is resumed or started from."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featurestore import Clip
from mervcache.errors import UserError
from mervcache.files import file_sha256
from trainer.config import FusionConfig, TrainConfig, in_paper_order, used_encoders
from trainer.loop.train import train
from trainer.runs import checkpoint
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics
from trainer.runs.weight_names import to_file_names, to_model_names
from trainer.sources import opened

PAPER = ("languagebind", "dinov2", "vivit", "siglip")  # MERV_SPEC section 0
WIDTHS = {"languagebind": 8, "dinov2": 8, "vivit": 6, "siglip": 6, "clip": 6}


@pytest.fixture
def five(tmp_path, toy_identity, write_store, make_sample):
    """A store of five encoders and 12 questions, as a folder."""
    identities = {name: toy_identity(name, grid=(4, 2, 2), width=width) for name, width in WIDTHS.items()}
    videos = [Clip(dataset="set", path=f"clip{index}.mp4", kind="video") for index in range(12)]
    random = np.random.default_rng(2)
    arrays = {
        (name, clip.clip_id): {"tokens": random.standard_normal((4, 2, 2, width)).astype(np.float16)}
        for name, width in WIDTHS.items()
        for clip in videos
    }
    writer = write_store(tmp_path / "five.zarr", videos, identities, arrays)
    writer.add_samples("toy", [make_sample(index) for index in range(12)])
    writer.publish_snapshot()
    return str(tmp_path / "five.zarr")


@pytest.fixture
def weighted(config):
    """A weight per place: the order shows."""
    return replace(config, fusion=FusionConfig(name="learnable_weights"))


def run_to_end(config, store, out, **options):
    with opened(store) as open_tokens:
        samples, source = open_tokens(config, out)
        return train(config, samples, source, out, store=store, quiet=True, **options)


def losses(run):
    return [row["loss"] for row in read_metrics(run)]


def test_the_paper_comes_first_and_others_follow_by_name():
    assert in_paper_order(["siglip", "clip", "vivit", "a_b", "dinov2", "languagebind"]) == [*PAPER, "a_b", "clip"]
    assert in_paper_order(["vivit", "dinov2@b", "dinov2@a"]) == ["dinov2@a", "dinov2@b", "vivit"]


def test_a_fusion_of_one_reads_the_first_of_the_encoders_that_are_named(tmp_path, five, config):
    first = replace(config, fusion=FusionConfig(name="first"), encoders=("vivit", "languagebind"), max_steps=1)
    run_to_end(first, five, tmp_path / "run")
    assert load_run(tmp_path / "run").built.model.encoders == ("vivit",)
    run_to_end(replace(first, encoders=()), five, tmp_path / "default")
    assert load_run(tmp_path / "default").built.model.encoders == ("languagebind",)
    with pytest.raises(UserError, match="unknown encoder 'vit'"):
        used_encoders(TrainConfig(encoders=("dinov2", "vit")), ["dinov2", "vivit"])


def test_a_run_has_the_order_of_the_paper_and_records_it(tmp_path, five, weighted):
    run_to_end(replace(weighted, max_steps=1), five, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["encoder_order"] == [*PAPER, "clip"]
    held = load_file(checkpoint.newest(tmp_path / "run") / checkpoint.MODEL_FILE)
    assert {name.split(".")[1] for name in held if name.startswith("projector.")} == set(WIDTHS)
    run_to_end(replace(weighted, max_steps=1, encoders=("siglip", "dinov2")), five, tmp_path / "named")
    assert json.loads((tmp_path / "named/run.json").read_text())["encoder_order"] == ["siglip", "dinov2"]


def as_version_01(run):
    """What version 0.1 would have written: no order in the record, places in the names of weights and moments."""
    record = json.loads((run / "run.json").read_text())
    encoders = record.pop("encoder_order")
    (run / "run.json").write_text(json.dumps(record))
    folder = checkpoint.newest(run)
    state = json.loads((folder / checkpoint.STATE_FILE).read_text())
    state = {name: state[name] for name in ("step", "data_digest", "identities", "sha256", "validation")}
    for name in (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE):
        save_file(to_model_names(load_file(folder / name), encoders), folder / name)
        state["sha256"][name] = file_sha256(folder / name)
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(state))
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("".join(line + "\n" for line in settings.splitlines() if line[:2] != "- "))


def test_a_run_of_version_01_goes_on_in_its_own_order_with_the_losses_of_one_that_never_stopped(
    tmp_path, five, weighted
):
    alphabetical = sorted(WIDTHS)
    whole = tmp_path / "whole"
    run_to_end(replace(weighted, encoders=tuple(alphabetical)), five, whole)
    run = tmp_path / "run"
    run_to_end(replace(weighted, encoders=tuple(alphabetical)), five, run, stop_at=3)
    as_version_01(run)
    lines = (run / "config.yaml").read_text().replace("encoders:\n", "encoders: []\n")
    (run / "config.yaml").write_text(lines)
    assert "projectors.0.head.weight" in load_file(checkpoint.newest(run) / checkpoint.MODEL_FILE)
    run_to_end(weighted, five, run, resume=True)
    assert losses(run) == losses(whole)
    weights, wanted = (load_run(folder).built.model.state_dict() for folder in (run, whole))
    assert all(torch.equal(value, weights[name]) for name, value in wanted.items())


def test_a_start_gives_its_encoders_and_their_order(tmp_path, five, weighted):
    run_to_end(replace(weighted, encoders=("vivit", "languagebind"), max_steps=1), five, tmp_path / "first")
    run_to_end(replace(weighted, init=str(tmp_path / "first"), max_steps=1), five, tmp_path / "second")
    record = json.loads((tmp_path / "second/run.json").read_text())
    assert record["encoder_order"] == ["vivit", "languagebind"]
    assert record["started_from"].endswith("loaded projector vivit, projector languagebind, fusion, LLM")
    shutil.rmtree(tmp_path / "first")  # a run that has begun does not need its start
    run_to_end(replace(weighted, init=str(tmp_path / "first"), max_steps=1), five, tmp_path / "second", resume=True)


def test_names_in_files_are_those_of_encoders():
    names = {"projectors.0.head.weight": 0, "projectors.1.head.weight/exp_avg": 1, "fusion.query_M": 2}
    by_encoder = {"projector.a.b.head.weight": 0, "projector.a.head.weight/exp_avg": 1, "fusion.query_M": 2}
    assert to_file_names(names, ["a.b", "a"]) == by_encoder
    assert to_model_names(by_encoder, ["a.b", "a"]) == names
    assert to_model_names(by_encoder, ["a", "a.b"])["projectors.0.head.weight/exp_avg"] == 1
