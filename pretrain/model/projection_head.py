"""The projection head of self-distillation (arXiv 2104.14294)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.vit import INITIAL_STD


class ProjectionHead(nn.Module):
    """Compare tokens with learned prototypes: three linear layers, then the cosine similarity to each prototype.

    Args:
        width: Width D of the tokens.
        hidden_size: Width of the two hidden layers.
        bottleneck_size: Width of the layer in which tokens and prototypes are compared.
        num_prototypes: Number of prototypes K.
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

    def forward(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """Return logits in fp32 [..., K] for tokens [..., D]: the cosine similarities divided by the temperature."""
        projected = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(tokens)))))
        # The division is cheap here: there may be 65,536 prototypes, but the bottleneck has a few hundred channels.
        logits = F.linear(F.normalize(projected, dim=-1) / temperature, F.normalize(self.prototypes, dim=-1))
        return logits.float()
