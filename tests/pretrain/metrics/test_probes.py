"""Probes of frozen features against scikit-learn's, on its digits."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pretrain.metrics.probes import (
    NUM_NEIGHBORS,
    TEMPERATURE,
    effective_rank,
    feature_spread,
    predict_by_linear_probe,
    predict_by_neighbors,
)

DIGITS = load_digits()
FEATURES = DIGITS.data + np.random.default_rng(0).normal(0, 4, DIGITS.data.shape)  # else everything is too easy
KNOWN, UNKNOWN = slice(0, 900), slice(900, None)


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(FEATURES[KNOWN]),
        torch.from_numpy(DIGITS.target[KNOWN]),
        torch.from_numpy(FEATURES[UNKNOWN]),
    )


def test_neighbors_vote_as_in_scikit_learn() -> None:
    theirs = KNeighborsClassifier(
        NUM_NEIGHBORS, metric="cosine", weights=lambda distances: np.exp(-distances / TEMPERATURE)
    ).fit(FEATURES[KNOWN], DIGITS.target[KNOWN])
    expected = theirs.predict(FEATURES[UNKNOWN])
    found = predict_by_neighbors(*tensors()).numpy()
    assert 0.7 < (expected == DIGITS.target[UNKNOWN]).mean() < 1
    assert (found == expected).mean() > 0.999


@pytest.mark.parametrize("classes", [range(10), (0, 1), (3, 7), (2, 5, 9)])
def test_the_linear_probe_is_scikit_learns_logistic_regression(classes: Sequence[int]) -> None:
    """As many features as known images, many of them alike: that is where fp32 stops early."""
    known, unknown, random = slice(0, 300), slice(300, None), np.random.default_rng(1)
    alike = FEATURES @ random.normal(0, 0.1, (64, 300)) + random.normal(0, 0.1, (len(FEATURES), 300))
    constant = np.where(np.arange(len(FEATURES)) < known.stop, 0.1, 0.2)[:, None]
    features = np.hstack([FEATURES, alike, constant]).astype(np.float32)  # as an encoder gives them
    exact, truth = features.astype(np.float64), np.asarray(classes)[DIGITS.target % len(classes)]
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000, tol=1e-9))
    expected = theirs.fit(exact[known], truth[known]).predict(exact[unknown])
    assert 0.6 < (expected == truth[unknown]).mean() < 1
    parts = (torch.from_numpy(part) for part in (features[known], truth[known], features[unknown]))
    with torch.no_grad():
        found = predict_by_linear_probe(*parts).numpy()
    assert (found == truth[unknown]).sum() == (expected == truth[unknown]).sum()
    scores = theirs.decision_function(exact[unknown])
    is_tie = (np.abs(scores) if len(classes) == 2 else np.diff(np.sort(scores)[:, -2:])[:, 0]) < 1e-3
    assert np.array_equal(found[~is_tie], expected[~is_tie])
    assert is_tie.mean() < 0.01


def test_few_known_images_and_constant_features_are_fine() -> None:
    known, labels, unknown = torch.tensor([[1.0, 5.0], [-1.0, 5.0]]), torch.tensor([1, 0]), torch.tensor([[2.0, 5.0]])
    assert predict_by_neighbors(known, labels, unknown).tolist() == [1]
    assert predict_by_linear_probe(known, labels, unknown).tolist() == [1]


def test_a_collapse_is_seen() -> None:
    torch.manual_seed(0)
    even = torch.randn(2000, 16)
    line = torch.randn(2000, 1) * torch.ones(1, 16)
    point = torch.ones(2000, 16) + 1e-4 * even
    assert effective_rank(even) == pytest.approx(16, rel=0.02)
    assert effective_rank(line) == pytest.approx(1, rel=1e-6)
    assert feature_spread(even) == pytest.approx(1, abs=0.02)
    assert feature_spread(point) < 1e-3
