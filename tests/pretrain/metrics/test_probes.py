"""k-NN and the linear probe predict what scikit-learn predicts, on its digits."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pretrain.metrics.knn import NUM_NEIGHBORS, TEMPERATURE, predict_knn
from pretrain.metrics.linear_probe import predict_linear_probe

DIGITS = load_digits()
FEATURES = DIGITS.data + np.random.default_rng(0).normal(
    0, 4, DIGITS.data.shape
)  # without noise, every prediction is right
KNOWN, UNKNOWN = slice(0, 900), slice(900, None)


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(FEATURES[KNOWN]),
        torch.from_numpy(DIGITS.target[KNOWN]),
        torch.from_numpy(FEATURES[UNKNOWN]),
    )


def test_knn_equals_scikit_learn() -> None:
    theirs = KNeighborsClassifier(
        NUM_NEIGHBORS, metric="cosine", weights=lambda distances: np.exp(-distances / TEMPERATURE)
    ).fit(FEATURES[KNOWN], DIGITS.target[KNOWN])
    expected = theirs.predict(FEATURES[UNKNOWN])
    found = predict_knn(*tensors()).numpy()
    assert 0.7 < (expected == DIGITS.target[UNKNOWN]).mean() < 1
    assert (found == expected).mean() > 0.999


@pytest.mark.parametrize("classes", [range(10), (0, 1), (3, 7), (2, 5, 9)])
def test_linear_probe_equals_scikit_learn(classes: Sequence[int]) -> None:
    """As many features as training images, many of them correlated: a case where fp32 stops too early."""
    known, unknown, random = slice(0, 300), slice(300, None), np.random.default_rng(1)
    correlated = FEATURES @ random.normal(0, 0.1, (64, 300)) + random.normal(0, 0.1, (len(FEATURES), 300))
    constant = np.where(np.arange(len(FEATURES)) < known.stop, 0.1, 0.2)[:, None]
    features = np.hstack([FEATURES, correlated, constant]).astype(np.float32)  # the precision of an encoder
    exact, truth = features.astype(np.float64), np.asarray(classes)[DIGITS.target % len(classes)]
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000, tol=1e-9))
    expected = theirs.fit(exact[known], truth[known]).predict(exact[unknown])
    assert 0.6 < (expected == truth[unknown]).mean() < 1
    parts = (torch.from_numpy(part) for part in (features[known], truth[known], features[unknown]))
    with torch.no_grad():
        found = predict_linear_probe(*parts).numpy()
    assert (found == truth[unknown]).sum() == (expected == truth[unknown]).sum()
    scores = theirs.decision_function(exact[unknown])
    is_tie = (np.abs(scores) if len(classes) == 2 else np.diff(np.sort(scores)[:, -2:])[:, 0]) < 1e-3
    assert np.array_equal(found[~is_tie], expected[~is_tie])
    assert is_tie.mean() < 0.01


def test_few_images_and_constant_features_are_supported() -> None:
    known, labels, unknown = torch.tensor([[1.0, 5.0], [-1.0, 5.0]]), torch.tensor([1, 0]), torch.tensor([[2.0, 5.0]])
    assert predict_knn(known, labels, unknown).tolist() == [1]
    assert predict_linear_probe(known, labels, unknown).tolist() == [1]
