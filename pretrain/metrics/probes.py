"""What frozen features are good for, and whether they collapse: pure functions of tensors.

The letters: N known and M unknown images, D the features' size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_NEIGHBORS, TEMPERATURE = 20, 0.07  # of DINO's k-NN (arXiv 2104.14294)
ROWS_AT_A_TIME = 1024
PENALTY = 1.0  # scikit-learn's default C
LARGEST_ITERATIONS = 1000  # some hundred do
LEAST_GRADIENT = 1e-7
STEPS_REMEMBERED = 10  # scipy's; torch's 100 would take 36 GB for 21,841 classes and D = 1024
EPSILON = torch.finfo(torch.float64).eps


def predict_by_neighbors(known: Tensor, labels: Tensor, unknown: Tensor) -> Tensor:
    """Classify by the nearest neighbors in cosine similarity s, each with the vote exp(s / 0.07).

    Args:
        known: [N, D].
        labels: of the known, [N].
        unknown: [M, D].

    Returns:
        Labels [M].
    """
    known, unknown = F.normalize(known.float(), dim=1), F.normalize(unknown.float(), dim=1)
    predicted = []
    for rows in unknown.split(ROWS_AT_A_TIME):  # type: ignore[no-untyped-call]
        similarity, nearest = (rows @ known.T).topk(min(NUM_NEIGHBORS, len(known)), dim=1)
        votes = torch.zeros(len(rows), int(labels.max()) + 1, device=known.device)
        votes.scatter_add_(1, labels[nearest], ((similarity - 1) / TEMPERATURE).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def predict_by_linear_probe(known: Tensor, labels: Tensor, unknown: Tensor) -> Tensor:
    """Classify by logistic regression on standardised features, with scikit-learn's objective, minimised by L-BFGS.

    In fp64, because fp32 no longer tells losses apart while predictions still change.

    Args:
        known: [N, D].
        labels: of the known, [N].
        unknown: [M, D].

    Returns:
        Labels [M].
    """
    known, unknown = known.double(), unknown.double()
    classes, labels = torch.unique(labels, return_inverse=True)
    mean, deviation = known.mean(dim=0), known.std(dim=0, correction=0)
    rounding = len(known) * EPSILON * mean.abs()  # what a constant feature deviates by
    deviation = torch.where(deviation > rounding, deviation, 1.0)
    known, unknown = (known - mean) / deviation, (unknown - mean) / deviation
    weight = nn.Parameter(known.new_zeros(len(classes), known.shape[1]))
    bias = nn.Parameter(known.new_zeros(len(classes)))
    # Two classes have one weight in scikit-learn: as two of opposite sign under twice the penalty.
    penalty = (2 if len(classes) == 2 else 1) / (2 * PENALTY * len(known))
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=LARGEST_ITERATIONS,
        tolerance_grad=LEAST_GRADIENT,
        tolerance_change=EPSILON,
        history_size=STEPS_REMEMBERED,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        solver.zero_grad()
        loss = F.cross_entropy(known @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    found: Tensor = classes[(unknown @ weight.detach().T + bias.detach()).argmax(dim=1)]
    return found


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
