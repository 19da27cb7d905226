"""How many directions features use: measures of collapse."""

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """Return the effective rank of features [N, D]: the exponential of the entropy of their singular values.

    It is between 1 and min(N, D) (RankMe, arXiv 2210.02885). Features are centered first, because a large mean would
    dominate the spectrum.
    """
    values = torch.linalg.svdvals(features.double() - features.double().mean(dim=0))
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def feature_spread(features: Tensor) -> float:
    """Return how evenly features [N, D] are spread over all directions (arXiv 2011.10566).

    It is 0 if all features have the same direction and about 1 if their directions are uniform.
    """
    directions = F.normalize(features.double(), dim=1)
    return float(directions.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5)
