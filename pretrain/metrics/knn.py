"""k-nearest-neighbor classification of frozen features, as in DINO (arXiv 2104.14294)."""

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_NEIGHBORS = 20
TEMPERATURE = 0.07
ROWS_AT_A_TIME = 1024  # bounds the memory of the similarity matrix


def predict_knn(train_features: Tensor, train_labels: Tensor, features: Tensor) -> Tensor:
    """Classify features by their nearest neighbors in cosine similarity s, each with the vote exp(s / 0.07).

    Args:
        train_features: Features [N, D] with known labels.
        train_labels: Labels [N].
        features: Features [M, D] to classify.

    Returns:
        Predicted labels [M].
    """
    train_features, features = F.normalize(train_features.float(), dim=1), F.normalize(features.float(), dim=1)
    predicted = []
    for rows in features.split(ROWS_AT_A_TIME):  # type: ignore[no-untyped-call]
        similarity, nearest = (rows @ train_features.T).topk(min(NUM_NEIGHBORS, len(train_features)), dim=1)
        votes = torch.zeros(len(rows), int(train_labels.max()) + 1, device=train_features.device)
        votes.scatter_add_(1, train_labels[nearest], ((similarity - 1) / TEMPERATURE).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)
