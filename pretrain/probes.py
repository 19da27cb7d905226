"""What frozen features are good for, and whether they collapse: pure functions of tensors.

The letters: N known and M unknown images, D the features' size, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's k-NN (arXiv 2104.14294)
ROWS_AT_A_TIME = 1024
PENALTY = 1.0  # scikit-learn's default C
LARGEST_ITERATIONS = 200


def predict_by_neighbours(known: Tensor, labels: Tensor, unknown: Tensor, num_classes: int) -> Tensor:
    """Classify by the nearest neighbours in cosine similarity s, each with the vote exp(s / 0.07).

    Args:
        known: [N, D].
        labels: of the known, [N].
        unknown: [M, D].
        num_classes: K.

    Returns:
        Labels [M].
    """
    known, unknown = F.normalize(known.float(), dim=1), F.normalize(unknown.float(), dim=1)
    predicted = []
    for rows in unknown.split(ROWS_AT_A_TIME):  # type: ignore[no-untyped-call]
        similarity, nearest = (rows @ known.T).topk(min(NUM_NEIGHBOURS, len(known)), dim=1)
        votes = torch.zeros(len(rows), num_classes, device=known.device)
        votes.scatter_add_(1, labels[nearest], ((similarity - 1) / TEMPERATURE).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def predict_by_linear_probe(known: Tensor, labels: Tensor, unknown: Tensor, num_classes: int) -> Tensor:
    """Classify by logistic regression on standardised features, with scikit-learn's objective, minimised by L-BFGS.

    Args:
        known: [N, D].
        labels: of the known, [N].
        unknown: [M, D].
        num_classes: K.

    Returns:
        Labels [M].
    """
    mean, deviation = known.mean(dim=0), known.std(dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    known, unknown = (known - mean) / deviation, (unknown - mean) / deviation
    weight = nn.Parameter(known.new_zeros(num_classes, known.shape[1]))
    bias = nn.Parameter(known.new_zeros(num_classes))
    solver = torch.optim.LBFGS([weight, bias], max_iter=LARGEST_ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> float:
        solver.zero_grad()
        penalty = weight.square().sum() / (2 * PENALTY * len(known))
        loss = F.cross_entropy(known @ weight.T + bias, labels) + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    return (unknown @ weight.detach().T + bias.detach()).argmax(dim=1)


def effective_rank(features: Tensor) -> float:
    """Return how many directions features [N, D] vary in: exp of their singular values' entropy (arXiv 2210.02885).

    Their mean is taken out before, since it says nothing and would outweigh the rest.
    """
    values = torch.linalg.svdvals(features.double() - features.double().mean(dim=0))
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def feature_spread(features: Tensor) -> float:
    """Return 1 where features [N, D] point everywhere evenly, 0 where all point the same way (arXiv 2011.10566)."""
    directions = F.normalize(features.double(), dim=1)
    return float(directions.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5)
