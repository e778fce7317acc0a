"""A run's loss on tokens in each storage dtype: the tokens of a real store of that dtype, and the losses they give."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from featurestore import Clip, FeatureStore, StoreWriter
from featurestore.quality import STORED, read_distortion
from featurestore.storage_dtypes import OverflowedTokens
from mervcache.errors import UserError
from trainer.cli_eval import eval_main
from trainer.data.tokens import MemoryTokens, PrefixedTokens
from trainer.distortion import cast_tokens, measure_losses
from trainer.loop.distributed import make_accelerator
from trainer.loop.plan import Validation, make_plan
from trainer.loop.train import train
from trainer.runs.load import load_run
from trainer.sources import open_store

DTYPES = ("float16", "bfloat16", "uint8")


@pytest.fixture
def run(tmp_path, config, question_store):
    """A run of one step on the store: not clever, but its loss depends on every token."""
    samples, source = open_store(str(question_store), config)
    train(replace(config, max_steps=1), samples, source, tmp_path / "first", store=str(question_store), quiet=True)
    return tmp_path / "first"


def twin(question_store, path, dtype: str) -> FeatureStore:
    """The same clips and tokens, extracted into a store of another dtype."""
    source = FeatureStore.open(question_store)
    clips = [Clip(**row) for row in source.clips.select(["dataset", "path", "kind"]).to_pylist()]
    writer = StoreWriter.open_or_create(path, block_rows={"video": 32, "image": 4})
    rows = writer.add_clips(clips)
    for encoder, identity in source.encoders.items():
        stored_as = replace(identity, storage_dtype=dtype)
        block = writer.ensure_group("video", stored_as, batch_shape=1, weights_label="random:0").begin(0)
        for row, clip in rows:
            tokens = source.read([clip.clip_id], encoder=encoder)[0].astype(np.float32)
            block.add(row, {"tokens": tokens}, media_sha256=None, decoder=None)
        block.commit()
    writer.publish_snapshot()
    return FeatureStore.open(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cast_gives_what_a_store_of_that_dtype_gives(question_store, tmp_path, dtype):
    here, there = FeatureStore.open(question_store), twin(question_store, tmp_path / "twin.zarr", dtype)
    ids = here.clips["clip_id"].to_pylist()
    for encoder in here.encoders:
        cast = cast_tokens(torch.from_numpy(here.read(ids, encoder=encoder)), dtype)
        assert np.array_equal(cast.numpy(), there.read(ids, encoder=encoder))


def test_prefix_tokens_are_cast_as_a_store_keeps_them():
    prefix = torch.randn(2, 3, 1, 8)
    held = PrefixedTokens(tokens_BTHWD=None, prefix_BTKD=prefix)
    for dtype, kept in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("uint8", torch.float16)):
        assert torch.equal(cast_tokens(held, dtype).prefix_BTKD.float(), prefix.to(kept).float())
    with pytest.raises(OverflowedTokens):
        cast_tokens(torch.full((1, 1, 1, 1, 4), 1e5), "float16")


def test_losses_are_those_of_the_run_on_stores_of_each_dtype(run, question_store, tmp_path):
    path, record = measure_losses(run, None)
    assert (path, record.run, record.step, record.split, record.samples) == (
        str(question_store), "first", 1, "heldout", 3,
    )  # fmt: skip
    loaded = load_run(run)
    config = loaded.built.config
    samples, source = open_store(path, config)
    plan = replace(make_plan(config, samples, source), built=loaded.built)
    losses = {row.dtype: row.loss for row in record.rows}
    assert list(losses) == [STORED, *DTYPES]
    for dtype in DTYPES:
        store = twin(question_store, tmp_path / f"{dtype}.zarr", dtype)
        ids = store.clips["clip_id"].to_pylist()
        held = {encoder: torch.from_numpy(store.read(ids, encoder=encoder)) for encoder in store.encoders}
        found = Validation(plan, samples, MemoryTokens(ids, held), make_accelerator(config, run))()
        assert losses[dtype] == pytest.approx(found["val_loss"], abs=1e-6)
    assert losses["float16"] == losses[STORED]
    assert losses["uint8"] != losses[STORED]


def test_the_command_keeps_the_losses_in_the_store_s_journal_and_knows_the_splits(run, question_store):
    done = CliRunner().invoke(eval_main, ["distortion", "--checkpoint", str(run), "--limit", "2", "--json"])
    assert done.exit_code == 0, done.output
    printed, kept = json.loads(done.stdout), read_distortion(FeatureStore.open(question_store)).loss
    assert [row["loss"] for row in printed["rows"]] == [row.loss for row in kept.rows]
    assert (kept.samples, kept.weights) == (2, "random:0")
    table = CliRunner().invoke(eval_main, ["distortion", "--checkpoint", str(run), "--split", "train"])
    assert "on 18 samples of split train" in table.stdout
    assert "Tokens of seeded random weights" in table.stdout
    with pytest.raises(UserError, match=r"no sample of this store is of split 'test'; it has: heldout, train"):
        measure_losses(run, None, split="test")
