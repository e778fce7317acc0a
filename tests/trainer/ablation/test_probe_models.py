"""The fits of probes against solutions by Newton's method, and the folds they are tested on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.ablation.probe_labels import assign_folds, classes_of, make_splits
from trainer.ablation.probe_models import Rotation, fit_logistic


def newton(features_nD, label_n, l2):
    """Log-probabilities [n, C] at the minimum of mean cross-entropy + l2 / 2 |W|^2, the bias free."""
    n, num_classes = len(label_n), label_n.max() + 1
    with_one = np.concatenate([features_nD, np.ones((n, 1))], axis=1)
    penalty = np.full((with_one.shape[1], num_classes), l2)
    penalty[-1] = 0
    weight, target = np.zeros_like(penalty), np.eye(num_classes)[label_n]

    def log_probabilities(weight):
        logits = with_one @ weight
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    for _ in range(100):
        share = np.exp(log_probabilities(weight))
        gradient = with_one.T @ (share - target) / n + penalty * weight
        curvature = np.diag(penalty.ravel())
        for x, p in zip(with_one, share, strict=True):
            curvature += np.kron(np.outer(x, x), np.diag(p) - np.outer(p, p)) / n
        weight -= np.linalg.lstsq(curvature, gradient.ravel(), rcond=1e-12)[0].reshape(weight.shape)
    assert np.abs(gradient).max() < 1e-12
    return log_probabilities(weight)


def problem(n, width, num_classes=3):
    random = np.random.default_rng(0)
    label_n = np.arange(n) % num_classes
    return random.standard_normal((n, width)) + label_n[:, None] * 0.5, label_n


@pytest.mark.parametrize("l2", [1e-3, 0.1, 10.0])
def test_the_linear_probe_is_at_the_minimum(l2):
    features, label = problem(18, 4)
    (model,) = fit_logistic(torch.from_numpy(features), torch.from_numpy(label), [l2])
    found = model.log_probabilities(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(found, newton(features, label, l2), atol=2e-5)


@pytest.mark.parametrize(("n", "width"), [(24, 5), (12, 30)])  # more clips than channels, and fewer
def test_rotated_fits_are_those_on_standardised_features(n, width):
    features, label = problem(n, width)
    features = features * np.geomspace(0.1, 1e3, width) + 1e3
    features[:, 1] = 7.0  # never changes
    rotation = Rotation(torch.from_numpy(features))
    standard = (features - features.mean(axis=0)) / np.where(features.std(axis=0) > 1e-6, features.std(axis=0), np.inf)
    for l2, model in zip(
        (1.0, 0.01),
        fit_logistic(rotation.train_nR, torch.from_numpy(label), (1.0, 0.01), rotation.square_R),
        strict=True,
    ):
        found = model.log_probabilities(rotation(torch.from_numpy(features))).numpy()
        np.testing.assert_allclose(found, newton(standard, label, l2), atol=2e-5)


def test_a_class_that_was_not_learnt_is_never_predicted():
    features, _ = problem(8, 3)
    label = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])
    (model,) = fit_logistic(torch.from_numpy(features), label, [1.0])
    assert torch.isinf(model.log_probabilities(torch.from_numpy(features))[:, 1]).all()


def ids(count, spans=3):
    return [f"set/v{index // spans}.mp4#t={index % spans}.0,{index % spans + 1}.0" for index in range(count)]


def test_folds_never_split_a_video_and_share_the_classes():
    clips, random = ids(300), np.random.default_rng(1)
    label = np.repeat(random.choice(3, 100, p=[0.6, 0.3, 0.1]), 3)
    fold = assign_folds(clips, label, 5, 0)
    for video in range(100):
        assert len(set(fold[3 * video : 3 * video + 3])) == 1
    for kind in range(3):
        counts = np.bincount(fold[label == kind], minlength=5)
        assert counts.max() - counts.min() <= 3  # a video


def test_folds_follow_from_ids_labels_and_seed_alone():
    clips, label = ids(60), np.repeat(np.arange(20) % 2, 3)
    fold = assign_folds(clips, label, 4, 7)
    turned = np.random.default_rng(2).permutation(60)
    again = assign_folds([clips[index] for index in turned], label[turned], 4, 7)
    np.testing.assert_array_equal(again, fold[turned])
    assert (assign_folds(clips, label, 4, 8) != fold).any()


def test_inner_folds_are_within_what_is_learnt_from_and_split_no_video():
    clips = ids(60)
    classes, _ = classes_of({clip: str(index // 3 % 2) for index, clip in enumerate(clips)})
    video = classes.video_N
    tested = []
    for split in make_splits(classes, folds=4, inner_folds=3, seed=0):
        assert not set(video[split.train]) & set(video[split.test])
        tested += split.test.tolist()
        for fit, check in split.inner:
            assert sorted([*fit, *check]) == split.train.tolist()
            assert not set(video[fit]) & set(video[check])
    assert sorted(tested) == list(range(60))
