"""The same tokens from a folder, from a bucket through the cache, and from a union of two stores: the same run.

Other tokens are refused.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from featurestore import FeatureStore, StoreWriter
from featurestore.transfer.merge import StoreCells, combine
from featurestore.transfer.sync import push
from mervcache.errors import UserError
from trainer.cli import train_main
from trainer.cli_eval import eval_main
from trainer.data.tokens import MemoryTokens
from trainer.runs import checkpoint
from trainer.runs.run_record import RunRecord, read_metrics
from trainer.sources import check_identities

pytestmark = pytest.mark.slow

CACHE_BYTES = 48 * 1024  # fewer than the store's, so that room has to be made
SETTINGS = {
    "llm": "fresh:mini",
    "projector": {"grid": [2, 2, 2]},
    "max_steps": 5,
    "batch_size": 6,
    "micro_batch_size": 3,
    "checkpoint_every": 2,
    "keep_checkpoints": 3,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SETTINGS))
    return tmp_path


@pytest.fixture
def bucket(s3, question_store, here, monkeypatch):
    """The store's address in a bucket, and a small cache for what is read from there."""
    push(question_store, s3)
    monkeypatch.setenv("MERV_CACHE_DIR", str(here / "cache"))
    monkeypatch.setenv("MERV_CACHE_BYTES", str(CACHE_BYTES))
    return s3


def told_by(command, *arguments):
    result = CliRunner().invoke(command, [*(str(argument) for argument in arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def train(*arguments):
    return told_by(train_main, "--recipe", "demo", "--config", "small.yaml", *arguments)


def steps(run):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run)]


def test_a_run_from_a_bucket_is_the_run_from_the_folder_that_was_pushed_there(bucket, here, question_store):
    folder = train("--from-cache", question_store, "--out", "folder")
    far = train("--from-cache", bucket, "--out", "far")
    assert steps("far") == steps("folder")
    assert far["data_digest"] == folder["data_digest"]
    assert RunRecord.read(here / "far").store == bucket
    assert train("--from-cache", bucket, "--dry-run") == train("--from-cache", question_store, "--dry-run")

    shutil.rmtree(checkpoint.newest("far"))  # as if killed behind step 4
    assert told_by(train_main, "--resume", "far")["steps"] == 5
    assert steps("far") == steps("folder")
    shutil.rmtree(checkpoint.newest("far"))
    train("--from-cache", question_store, "--out", "far", "--resume", "auto")  # the same data lie nearer now
    assert steps("far") == steps("folder")

    by_folder = told_by(eval_main, "run", "--checkpoint", "folder")
    assert told_by(eval_main, "run", "--checkpoint", "far") == by_folder
    assert told_by(eval_main, "run", "--checkpoint", "folder", "--store", bucket) == by_folder
    kept = sum(path.stat().st_blocks * 512 for path in (here / "cache").rglob("*") if path.is_file())
    assert 0 < kept <= CACHE_BYTES + 16 * 1024  # and the files of the last reads


def test_a_bucket_without_a_store_is_said(bucket):
    result = CliRunner().invoke(
        train_main, ["--from-cache", bucket.replace("one.zarr", "two.zarr"), "--recipe", "demo"]
    )
    assert result.exit_code == 1
    assert "there is no feature store at s3://" in result.stderr


def test_a_union_of_stores_made_apart_gives_the_run_of_one_store(here, make_question_store):
    whole = make_question_store(here / "whole.zarr")
    parts = [
        make_question_store(here / "mine/a.zarr", range(12, 21)),
        make_question_store(here / "theirs/b.zarr", range(14)),
    ]
    combine([StoreCells(part) for part in parts], here / "union.zarr")
    at_once = train("--from-cache", whole, "--out", "at-once")
    from_union = train("--from-cache", here / "union.zarr", "--out", "from-union")
    assert from_union["data_digest"] == at_once["data_digest"]
    assert steps("from-union") == steps("at-once")
    assert told_by(eval_main, "run", "--checkpoint", "from-union") == told_by(
        eval_main, "run", "--checkpoint", "at-once"
    )


def test_a_run_goes_on_with_the_snapshot_it_began_with_however_the_store_has_grown(here, make_question_store):
    store = make_question_store(here / "lab.zarr", range(12))
    begun = train("--from-cache", store, "--out", "run")
    losses = steps("run")
    shutil.rmtree(checkpoint.newest("run"))  # as if killed behind step 4
    make_question_store(store, range(12, 18))
    resumed = train("--from-cache", store, "--out", "run", "--resume", "auto")
    assert resumed["data_digest"] == begun["data_digest"]
    assert steps("run") == losses
    assert train("--from-cache", store, "--out", "new")["data_digest"] != begun["data_digest"]


def add_to_first_block(store, identity):
    """An encoder that somebody else has begun to add: four clips have its tokens."""
    writer = StoreWriter.open(store)
    group = writer.ensure_group("video", identity, batch_shape=1, weights_label="random:0", new_identity=True)
    block = group.begin(0)
    for row in range(4):
        tokens = np.zeros((*identity.grid, identity.width), np.float16)
        block.add(row, {"tokens": tokens}, media_sha256="0" * 64, decoder="frames/1")
    block.commit()
    writer.publish_snapshot()


def test_a_run_is_scored_on_its_own_tokens_whatever_encoders_the_store_has_got(
    here, question_store, identities, toy_identity
):
    train("--from-cache", question_store, "--out", "run")
    before = told_by(eval_main, "run", "--checkpoint", "run")
    add_to_first_block(question_store, toy_identity("clip"))
    add_to_first_block(question_store, replace(identities["dinov2"], grid=(2, 1, 1)))
    assert sorted(FeatureStore.open(question_store).encoders)[:2] != ["clip", "dinov2"]  # there are two by that name
    assert told_by(eval_main, "run", "--checkpoint", "run") == before


def test_questions_of_sets_that_the_run_was_not_trained_on_are_asked(here, make_question_store, make_sample):
    store = make_question_store(here / "lab.zarr", range(18))
    (here / "small.yaml").write_text(yaml.safe_dump({**SETTINGS, "samples": ["toy-finetune"]}))
    train("--from-cache", store, "--out", "run")
    writer = StoreWriter.open(store)
    writer.add_samples("quiz", [make_sample(3, split="heldout")])
    writer.publish_snapshot()
    (answer,) = told_by(eval_main, "run", "--checkpoint", "run")["answers"]
    assert answer["sample_id"] == make_sample(3).sample_id


def test_tokens_of_another_identity_are_refused(brief, samples, tokens):
    ids = [sample.clip_id for sample in samples]
    check_identities(brief, tokens)
    other = MemoryTokens(ids, {"dinov2": tokens.fetch(ids)["dinov2"]})
    with pytest.raises(UserError, match="trained on vivit tokens of identity memory:vivit, this source has none"):
        check_identities(brief, other)
