"""Linear probe of frozen features: scikit-learn's logistic regression, on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PENALTY = 1.0  # scikit-learn's default C
MAX_ITERATIONS = 1000  # a few hundred are typical
GRADIENT_TOLERANCE = 1e-7
HISTORY_SIZE = 10  # scipy's default; torch's 100 would take 36 GB for 21,841 classes and D = 1024
EPSILON = torch.finfo(torch.float64).eps


def predict_linear_probe(train_features: Tensor, train_labels: Tensor, features: Tensor) -> Tensor:
    """Classify features by logistic regression on standardized features.

    The objective is scikit-learn's and is minimized by L-BFGS. It is computed in fp64, because in fp32 the loss stops
    changing while predictions still do.

    Args:
        train_features: Features [N, D] with known labels.
        train_labels: Labels [N].
        features: Features [M, D] to classify.

    Returns:
        Predicted labels [M].
    """
    known, unknown = train_features.double(), features.double()
    classes, labels = torch.unique(train_labels, return_inverse=True)
    mean, deviation = known.mean(dim=0), known.std(dim=0, correction=0)
    rounding = len(known) * EPSILON * mean.abs()  # deviation of a constant feature due to rounding
    deviation = torch.where(deviation > rounding, deviation, 1.0)
    known, unknown = (known - mean) / deviation, (unknown - mean) / deviation
    weight = nn.Parameter(known.new_zeros(len(classes), known.shape[1]))
    bias = nn.Parameter(known.new_zeros(len(classes)))
    # For two classes, scikit-learn has a single weight. Two weights of opposite sign equal it under twice the penalty.
    penalty = (2 if len(classes) == 2 else 1) / (2 * PENALTY * len(known))
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=EPSILON,
        history_size=HISTORY_SIZE,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> float:
        solver.zero_grad()
        loss = F.cross_entropy(known @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    with torch.enable_grad():
        solver.step(loss_and_gradient)  # type: ignore[no-untyped-call]
    predicted: Tensor = classes[(unknown @ weight.detach().T + bias.detach()).argmax(dim=1)]
    return predicted
