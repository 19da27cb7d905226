"""The head of self-distillation (arXiv 2104.14294): which of many prototypes a token is like.

The letters: D hidden size, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.vit import INITIAL_STD


class ProjectionHead(nn.Module):
    """Three linear layers into a narrow space; there, the cosine to each prototype.

    Args:
        width: D.
        hidden_size: of the layers between.
        bottleneck_size: of the narrow space.
        num_prototypes: K.
    """

    def __init__(self, width: int, hidden_size: int, bottleneck_size: int, num_prototypes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, bottleneck_size)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_size))
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.trunc_normal_(layer.weight, std=INITIAL_STD)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=INITIAL_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> float [..., K], from -1 to 1."""
        narrow = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(tokens)))))
        cosines = F.linear(F.normalize(narrow, dim=-1), F.normalize(self.prototypes, dim=-1))
        return cosines.float()
