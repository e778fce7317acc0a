"""Settings from a file and the command line: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import yaml

from mervcache.errors import UserError
from pipeline.cli.options import config_from_options, given_options
from pipeline.config import DECODER_NAMES, DEFAULT_BATCH, RUN_ONLY_SETTINGS, ExtractConfig, default_batch, read_config


def test_defaults_are_the_published_four_encoders_on_the_published_grid():
    config = read_config(None, {"dataset": "videollava"})
    assert config.encoders == ("languagebind", "dinov2", "vivit", "siglip")
    assert (config.grid, config.compute_dtype, config.storage_dtype) == ((16, 8, 8), "bfloat16", "float16")
    assert str(config.store_path) == "features/videollava.zarr"


def test_what_is_left_out_of_a_repeated_run_are_settings():
    assert {setting.name for setting in fields(ExtractConfig)} >= RUN_ONLY_SETTINGS


def test_what_is_given_on_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("dataset: demo\nlimit: 5\nweights: random:0\nencoders: dinov2, siglip\nretry_quarantine: true\n")
    options = {"dataset": None, "limit": 7, "weights": ("siglip=random:3",), "retry_quarantine": None, "grid": "8,4,4"}
    config = config_from_options(str(file), options)
    assert (config.dataset, config.limit, config.grid) == ("demo", 7, (8, 4, 4))
    assert config.retry_quarantine is True
    assert [(s.name, s.weights) for s in config.encoder_settings] == [("dinov2", "random:0"), ("siglip", "random:3")]


def test_options_of_the_dataset_are_pairs_with_values_as_yaml_reads_them():
    options = ("shards=https://host/{00..99}.tar", "spool_gb=1.5", "captions=false")
    config = config_from_options(None, {"dataset": "webdataset", "options": options})
    assert config.options == {"shards": "https://host/{00..99}.tar", "spool_gb": 1.5, "captions": False}
    with pytest.raises(UserError, match="--option is KEY=VALUE, got 'spool_gb'"):
        config_from_options(None, {"dataset": "webdataset", "options": ("spool_gb",)})


@pytest.mark.parametrize("spec", ["randm:0", "random", "random:x", "random:-1"])
def test_what_is_no_spec_of_weights_is_told_before_anything_is_listed(spec):
    with pytest.raises(UserError, match="random:SEED"):
        read_config(None, {"dataset": "demo", "weights": spec})


def test_raw_means_each_encoders_own_grid_from_both_sides(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("dataset: demo\ngrid: raw\n")
    assert read_config(file, {}).grid is None
    assert config_from_options(None, {"dataset": "demo", "grid": "raw"}).grid is None
    file.write_text("dataset: demo\ngrid: [8, 4, 4]\n")
    assert config_from_options(str(file), {"grid": "raw"}).grid is None


def test_one_crop_or_weights_spec_is_for_every_encoder_without_its_own():
    config = read_config(None, {"dataset": "demo", "crop": "squash", "weights": {"": "random:1", "vivit": "hub"}})
    assert {settings.crop for settings in config.encoder_settings} == {"squash"}
    assert [s.weights for s in config.encoder_settings] == ["random:1", "random:1", "hub", "random:1"]


def test_settings_of_clusters_come_from_the_file_and_one_by_one(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("dataset: demo\nscheduler: slurm\ncluster: {partition: gpu, walltime: 8:00:00, gpus: 4}\n")
    config = config_from_options(str(file), {"cluster": ("gpus=2", "exclusive=true"), "workers": 8, "device": "cpu"})
    request = config.cluster_request
    assert (request.scheduler, request.num_workers, request.device) == ("slurm", 8, "cpu")
    found = request.settings
    assert (found.partition, found.walltime, found.gpus, found.exclusive) == ("gpu", "08:00:00", 2, True)
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert read_config(again, {}) == config


REFUSED = [
    (
        {"cluster": {"partitoin": "gpu"}},
        "'cluster.partitoin', the nearest known one is 'cluster.partition'",
    ),
    ({"cluster": "gpu"}, "cluster must be `name: value` pairs, got 'gpu'"),
    ({"storrage_dtype": "uint8"}, "unknown setting 'storrage_dtype', the nearest known one is 'storage_dtype'"),
    ({"storage_dtype": "int4"}, "storage_dtype must be one of float16, bfloat16, uint8, got 'int4'"),
    ({"compute_dtype": "float16"}, "compute_dtype must be one of float32, bfloat16, got 'float16'"),
    ({"decoder": "opencv"}, "decoder must be one of frames/1, decord, ffmpeg, got 'opencv'"),
    ({"grid": [16, 8]}, "grid is three whole numbers T, H, W of at least 1, or raw, got [16, 8]"),
    ({"grid": [16, 8, 0]}, "grid is three whole numbers"),
    ({"grid": [16, 8, "x"]}, "grid is three whole numbers"),
    ({"grid": "coarse"}, "grid is three whole numbers T, H, W of at least 1, or raw, got 'coarse'"),
    ({"encoders": []}, "encoders must be a list of different names, got []"),
    ({"encoders": ["dinov2", "dinov2"]}, "encoders must be a list of different names"),
    ({"encoders": 4}, "encoders must be a list of different names, got 4"),
    (
        {"encoders": "videoma"},
        "unknown encoder 'videoma', the nearest known one is 'videomae'; known: ",
    ),
    ({"weights": {"vivi": "hub"}}, "weights: unknown encoder 'vivi', the nearest known one is 'vivit'"),
    ({"architecture": {"clipp": {}}}, "architecture: unknown encoder 'clipp', the nearest known one is 'clip'"),
    ({"encoders": ["siglip"], "architecture": {"siglip": {"num_layer": 3}}}, "the nearest known one is 'num_layers'"),
    ({"batch": {"vidio": 3}}, "batch: unknown kind 'vidio', the nearest known one is 'video'"),
    ({"batch": {"video": 0}}, "batch of video must be a whole number of clips of at least 1, got 0"),
    ({"block_rows": {"vidio": 8}}, "block_rows: unknown kind 'vidio', the nearest known one is 'video'"),
    ({"block_rows": {"video": 0}}, "block rows of video must be 1"),
    ({"weights": 3}, "weights must be `name: value` pairs, got 3"),
    ({"workers": "two"}, "workers must be a whole number, got 'two'"),
    ({"limit": 2.5}, "limit must be a whole number, got 2.5"),
    ({"threads": True}, "threads must be a whole number, got True"),
    ({"samples": "no"}, "samples must be true or false, got 'no'"),
    ({"root": 7}, "root must be text, got 7"),
    ({"max_failed": 1.5}, "max_failed is a share between 0 and 1, got 1.5"),
    ({"max_failed": "half"}, "max_failed must be a number, got 'half'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_is_named_with_its_value_and_what_is_possible(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_config(None, {"dataset": "demo", **settings})


def test_a_file_that_is_no_list_of_settings_is_refused_with_its_path(tmp_path):
    file = tmp_path / "a.yaml"
    with pytest.raises(UserError, match=r"a.yaml cannot be read: No such file"):
        read_config(file, {})
    file.write_text("- dinov2\n- siglip\n")
    with pytest.raises(UserError, match=r"a.yaml must hold `setting: value` lines, got list"):
        read_config(file, {})
    file.write_text("dataset: [demo\n")
    with pytest.raises(UserError, match=r"a.yaml is not YAML"):
        read_config(file, {})
    file.write_text("dataset: demo\nlimmit: 3\n")
    with pytest.raises(UserError, match=r"a.yaml: unknown setting 'limmit', the nearest known one is 'limit'"):
        read_config(file, {})


def test_a_dataset_must_be_named():
    with pytest.raises(UserError, match="which dataset\\? give --dataset NAME; `merv-pipeline datasets` lists them"):
        read_config(None, {})


def test_decoder_names_are_those_of_the_decoders():
    from pipeline.decode.decoders import DECODERS

    assert tuple(DECODERS) == DECODER_NAMES


def test_every_device_has_a_batch_of_its_own_or_the_processors():
    assert default_batch("cuda:1", "image") == DEFAULT_BATCH["cuda"]["image"]
    assert default_batch("mps", "video") == default_batch("cpu", "video") == DEFAULT_BATCH["cpu"]["video"]


def test_settings_survive_the_journal():
    import json

    config = read_config(None, {"dataset": "demo", "grid": [8, 4, 4], "architecture": {"dinov2": {"num_layers": 3}}})
    assert ExtractConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_settings_of_encoders_that_this_run_leaves_aside_are_kept_out_of_it():
    config = ExtractConfig(
        dataset="demo",
        encoders=("siglip",),
        architecture={"dinov2": {"num_layers": 3}, "siglip": {"num_layers": 4}},
    )
    assert [(s.name, s.architecture) for s in config.encoder_settings] == [("siglip", {"num_layers": 4})]


def test_an_option_that_is_no_yaml_is_text():
    options = given_options(
        {"options": ("shards={00..09}.tar", "prompt=What: is: it?", "spool_gb=1.5", "deep=" + "[" * 9999)}
    )
    assert options["options"] == {
        "shards": "{00..09}.tar",
        "prompt": "What: is: it?",
        "spool_gb": 1.5,
        "deep": "[" * 9999,
    }


SHORT_FORMS = [
    {"weights": "random:0"},
    {"crop": "squash"},
    {"frame_rule": "linspace-16", "encoders": "dinov2"},
    {"frame_dtype": "float32", "encoders": "languagebind"},
    {"encoders": "dinov2,siglip"},
    {"encoders": ["dinov2", "siglip"]},
    {"grid": "raw"},
    {"grid": "8,4,4"},
    {"grid": [8, 4, 4]},
    {"batch": {"video": 2}},
    {"max_failed": 1},
]


@pytest.mark.parametrize("settings", SHORT_FORMS, ids=str)
def test_python_takes_the_short_forms_of_a_file(settings, tmp_path):
    file = tmp_path / "extract.yaml"
    file.write_text(yaml.safe_dump({"dataset": "demo", **settings}))
    config = ExtractConfig(dataset="demo", **settings)
    assert config == read_config(file, {})
    assert ExtractConfig(**config.to_dict()) == config


def test_short_forms_reach_every_encoder():
    config = ExtractConfig(dataset="demo", weights="random:3", encoders="dinov2,siglip", grid="8,4,4")
    assert [(each.name, each.weights, each.grid) for each in config.encoder_settings] == [
        ("dinov2", "random:3", (8, 4, 4)),
        ("siglip", "random:3", (8, 4, 4)),
    ]


@pytest.mark.parametrize("grid", ["8,4", "8 by 4", "8,4,0", "", "8,4,-4"])
def test_a_grid_as_text_that_is_none_is_an_error_with_the_text(grid):
    with pytest.raises(UserError, match="three whole numbers"):
        ExtractConfig(dataset="demo", grid=grid)
