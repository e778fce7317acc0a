"""Effective ranks against numpy's singular values and cases that are known in closed form."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from featurestore import FeatureStore
from mervcache.errors import UserError
from trainer.ablation.rank import Covariance, effective_rank, ranks_of_run, ranks_of_store
from trainer.config import ProjectorConfig
from trainer.loop.train import train
from trainer.main import eval_main
from trainer.runs.load import load_run
from trainer.sources import open_store


def rank_by_svd(tokens_PD):
    """Roy and Vetterli's definition, on the centred matrix itself."""
    tokens_PD = np.asarray(tokens_PD, dtype=np.float64)
    singular = np.linalg.svd(tokens_PD - tokens_PD.mean(0), compute_uv=False)
    share = singular[singular > 1e-9 * singular[0]] / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def rank_of(*parts):
    sums = Covariance()
    for part in parts:
        sums.add(torch.as_tensor(part))
    return sums.rank()


@pytest.mark.parametrize("shape", [(40, 7), (6, 12)])  # more tokens than channels, and fewer
def test_it_is_that_of_the_singular_values(shape):
    tokens_PD = np.random.default_rng(0).standard_normal(shape) * np.geomspace(1, 50, shape[1])
    found = rank_of(tokens_PD[:3], tokens_PD[3:])
    assert found.rank == pytest.approx(rank_by_svd(tokens_PD), rel=1e-9)
    assert (found.tokens, found.width) == shape


def test_equal_directions_count_whole():
    """Eight orthogonal channels of equal spread: rank 8. Spreads of 3 to 1: shares 3/4 and 1/4."""
    eye = np.concatenate([np.eye(8), -np.eye(8)])
    assert rank_of(eye).rank == pytest.approx(8)
    two = np.array([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rank_of(two).rank == pytest.approx(math.exp(entropy))
    assert effective_rank(torch.diag(torch.tensor([9.0, 1.0, 0.0], dtype=torch.float64))) == pytest.approx(
        math.exp(entropy)
    )


def test_a_constant_has_no_part_in_it():
    tokens_PD = np.random.default_rng(1).standard_normal((30, 5))
    far = tokens_PD + 1e6  # without a shift, sums of squares of 1e12 would leave four digits
    assert rank_of(far[:10], far[10:]).rank == pytest.approx(rank_by_svd(tokens_PD), rel=1e-6)
    assert rank_of(np.full((4, 3), 7.0)).rank == 0.0
    assert rank_of(np.outer(np.arange(6.0), [1, 2, 3])).rank == pytest.approx(1.0)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        rank_of(np.array([[1.0, np.inf], [0.0, 1.0]]))


def all_tokens(store, clip_ids, encoder):
    return FeatureStore.open(store).read(clip_ids, encoder=encoder)


def test_a_store_alone(question_store):
    report = ranks_of_store(str(question_store), clips=100)
    ids = FeatureStore.open(question_store).clips["clip_id"].to_pylist()
    assert (report.clips, report.available, report.without, report.stills) == (21, 21, 0, 0)
    for row in report.rows:
        tokens = all_tokens(question_store, ids, row.encoder)
        assert row.enters.rank == pytest.approx(rank_by_svd(tokens.reshape(-1, tokens.shape[-1])), rel=1e-9)
        assert row.enters.tokens == 21 * 4 * 2 * 2
        assert row.leaves is None


def test_clips_without_tokens_are_counted_and_not_drawn(store):
    report = ranks_of_store(store.path, clips=100)
    assert (report.clips, report.available, report.without, report.stills) == (6, 6, 1, 1)
    alone = ranks_of_store(store.path, ["dinov2"], clips=100)
    assert (alone.clips, alone.without, [row.encoder for row in alone.rows]) == (7, 0, ["dinov2"])


def test_the_sample_follows_from_its_seed(question_store):
    def ranks(seed):
        return [row.enters.rank for row in ranks_of_store(str(question_store), clips=3, seed=seed).rows]

    assert ranks(0) == ranks(0)
    assert ranks(0) != ranks(1)


@pytest.fixture
def run(tmp_path, config, question_store):
    samples, source = open_store(str(question_store), config)
    train(replace(config, max_steps=1), samples, source, tmp_path / "run", store=str(question_store), quiet=True)
    return tmp_path / "run"


def test_what_leaves_is_what_the_projectors_of_the_run_make(run, question_store):
    report = ranks_of_run(run, clips=100)
    assert (report.run, report.step, report.store) == ("run", 1, str(question_store))
    ids = FeatureStore.open(question_store).clips["clip_id"].to_pylist()
    model = load_run(run).built.model
    for row, encoder, projector in zip(report.rows, model.encoders, model.projectors, strict=True):
        tokens = all_tokens(question_store, ids, encoder)
        with torch.no_grad():
            projected = projector(torch.from_numpy(tokens)).numpy().reshape(-1, 32)
        assert (row.encoder, row.leaves.tokens, row.leaves.width) == (encoder, 21 * 8, 32)
        assert row.enters.rank == pytest.approx(rank_by_svd(tokens.reshape(-1, tokens.shape[-1])), rel=1e-9)
        assert row.leaves.rank == pytest.approx(rank_by_svd(projected), rel=1e-3)
        assert row.leaves.rank <= tokens.shape[-1]  # a linear head adds no directions


def test_heads_of_several_layers(tmp_path, config, question_store):
    head = ProjectorConfig(grid=(2, 2, 2), head="fused-gelu-mlp")  # vivit's has 24, 32 and 32 channels
    changed = replace(config, max_steps=1, encoders=("vivit", "dinov2"), projector=head)
    samples, source = open_store(str(question_store), changed)
    train(changed, samples, source, tmp_path / "run", store=str(question_store), quiet=True)
    assert [row.leaves.width for row in ranks_of_run(tmp_path / "run").rows] == [32, 32]


def test_text_only_runs_have_none(tmp_path, config, question_store):
    changed = replace(config, max_steps=1, mode="text-only")
    samples, source = open_store(str(question_store), changed)
    train(changed, samples, source, tmp_path / "run", store=str(question_store), quiet=True)
    with pytest.raises(UserError, match="text-only"):
        ranks_of_run(tmp_path / "run")


def test_the_command(run, question_store):
    def call(*words):
        return CliRunner().invoke(eval_main, ["rank", *map(str, words)])

    report = json.loads(call(run, "--clips", 5, "--json").stdout)
    assert [row["encoder"] for row in report["rows"]] == ["dinov2", "vivit"]
    printed = call("--store", question_store, "--encoders", "vivit", "--clips", 5).stdout
    assert all(words in printed for words in ("Roy and Vetterli", "N = 5 clips", "from 21"))
    assert not any(words in printed for words in ("leaving", "dinov2"))
    assert "give a run" in call().stderr
    assert call(run, "--encoders", "vivit").exit_code == 1
