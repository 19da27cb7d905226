"""The light decoder of a masked autoencoder (arXiv 2111.06377).

The letters of `vit.py`; V of a sample's N patches were visible to the encoder, and E is the decoder's own width.
"""

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.vit import INITIAL_STD, Block, sincos_positions, take


class MAEDecoder(nn.Module):
    """Tokens of the visible patches in, pixels of the hidden ones out.

    Args:
        config: of the decoder.
        encoder_width: D.
    """

    def __init__(self, config: ModelConfig, encoder_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.embedding = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding: Tensor
        self.register_buffer("position_embedding", sincos_positions(config.image_size // config.patch_size, width))
        self.layers = nn.ModuleList(Block(config, drop_path=0.0) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.prediction = nn.Linear(width, config.num_channels * config.patch_size**2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=INITIAL_STD)

    def forward(self, tokens: Tensor, patch_order: Tensor) -> Tensor:
        """Rebuild the hidden patches.

        Attention does not know of order, so the patches stay in `patch_order` and take their positions along.

        Args:
            tokens: of the encoder, CLS first, then the visible patches, [B, 1 + V, D].
            patch_order: every patch once, the visible ones first, [B, N].

        Returns:
            [B, N - V, C * P * P], in the order of `patch_order`.
        """
        embedded = self.embedding(tokens)
        num_hidden = patch_order.shape[1] + 1 - tokens.shape[1]
        hidden = self.mask_token.expand(len(tokens), num_hidden, -1)
        positions = self.position_embedding.to(embedded.dtype).expand(len(tokens), -1, -1)
        ordered = torch.cat([positions[:, :1], take(positions[:, 1:], patch_order)], dim=1)
        tokens = torch.cat([embedded, hidden], dim=1) + ordered
        for layer in self.layers:
            tokens = layer(tokens)
        predicted: Tensor = self.prediction(self.norm(tokens[:, -num_hidden:]))
        return predicted
