"""The decoder of a masked autoencoder (arXiv 2111.06377).

Letters in shapes as in `vit.py`: V of an image's N patches were visible to the encoder, whose width is D.
"""

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.compiling import graph
from pretrain.model.vit import INITIAL_STD, Block, sincos_positions, take


class MAEDecoder(nn.Module):
    """Predict the pixels of hidden patches from the encoder's tokens of the visible ones.

    Args:
        config: Architecture of the decoder, a ViT over the same patches.
        encoder_width: Width D of the encoder's tokens.
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
        """Predict the pixels of the hidden patches.

        Attention is invariant to the order of its tokens, so they stay in `patch_order` and each is given the position
        embedding of its patch.

        Args:
            tokens: Output of the encoder [B, 1 + V, D]: CLS, then the visible patches.
            patch_order: Permutation of the patches [B, N], the visible ones first.

        Returns:
            Pixels [B, N - V, C * P * P] of the hidden patches, in the order of `patch_order`.
        """
        num_visible = tokens.shape[1]
        tokens = self.embed(tokens, patch_order)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.predict(tokens[:, num_visible:])

    @graph()
    def embed(self, tokens: Tensor, patch_order: Tensor) -> Tensor:
        """Return the decoder's input tokens [B, 1 + N, D]. Arguments are those of `forward`."""
        embedded = self.embedding(tokens)
        num_hidden = patch_order.shape[1] + 1 - tokens.shape[1]
        hidden = self.mask_token.expand(len(tokens), num_hidden, -1)
        positions = self.position_embedding.to(embedded.dtype).expand(len(tokens), -1, -1)
        ordered = torch.cat([positions[:, :1], take(positions[:, 1:], patch_order)], dim=1)
        return torch.cat([embedded, hidden], dim=1) + ordered

    @graph()
    def predict(self, tokens: Tensor) -> Tensor:
        """Return the pixels [B, N - V, C * P * P] for the last block's tokens of hidden patches."""
        predicted: Tensor = self.prediction(self.norm(tokens))
        return predicted
