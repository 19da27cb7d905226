"""A plain pre-norm Vision Transformer (arXiv 2010.11929).

The letters: B images, C channels, H height and W width in pixels, P patch size, N patches, T = N + 1 tokens (CLS is
the first), D hidden size, h heads, d = D / h.

q, k and v stand apart and the names follow transformers' `vit`, so that the map to Hugging Face is a renaming.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelConfig

INITIAL_STD = 0.02
PICKS_ABOVE = 0.1  # rate of drop path
# Of the blocks: with no drop path, a low rate and a high one, each in training and evaluation, of one size and of any.
MOST_GRAPHS = 32


class ViT(nn.Module):
    """Images in, normalized tokens out. Heads belong to the objectives."""

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        width, depth = config.hidden_size, config.num_hidden_layers
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding: Tensor
        if config.position_embedding == "sincos":
            positions = sincos_positions(config.image_size // config.patch_size, width)
            self.register_buffer("position_embedding", positions)
        else:
            self.position_embedding = nn.Parameter(torch.empty(1, config.num_patches + 1, width))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, config.drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self._initialize()

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        *,
        instead: tuple[Tensor, Tensor] | None = None,
        attends: bool = False,
    ) -> Tensor:
        """[B, C, H, W] -> [B, T, D]; of the patches `visible` alone, [B, V] -> [B, 1 + V, D], if that is given.

        Args:
            images: normalized; at another size than the config's, positions are interpolated.
            visible: the patches that are taken in, [B, V]; all without it.
            instead: the patches, bool [B, N], in whose place a token [1, 1, D] stands.
            attends: answer what each head of the last block takes into CLS from each patch, [B, h, N].
        """
        tokens = self.embed(images, visible, instead)
        for layer in self.layers:
            if attends and layer is self.layers[-1]:
                return attention_of_cls(layer, tokens)
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(layer, tokens, use_reentrant=False)
            else:
                tokens = layer(tokens)
        normalized: Tensor = self.norm(tokens)
        return normalized

    def embed(
        self, images: Tensor, visible: Tensor | None = None, instead: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """[B, C, H, W] -> [B, T, D]: patches embedded, positions added, CLS before them."""
        patches, positions = patchify(images, self.config.patch_size), self.position_embedding
        if patches.shape[1] != self.config.num_patches:
            positions = resize_positions(positions.float(), patches.shape[1])
        positions = positions.to(images.dtype)  # DeepSpeed leaves buffers in fp32
        patch_positions = positions[:, 1:]
        if visible is not None:
            patches = take(patches, visible)
            patch_positions = take(patch_positions.expand(len(images), -1, -1), visible)
        embedded = self.patch_embedding(patches)
        if instead is not None:
            embedded = torch.where(instead[0][..., None], instead[1].to(embedded.dtype), embedded)
        cls_token = (self.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        tokens: Tensor = self.dropout(torch.cat([cls_token, embedded + patch_positions], dim=1))
        return tokens

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=INITIAL_STD)
        if isinstance(self.position_embedding, nn.Parameter):
            nn.init.trunc_normal_(self.position_embedding, std=INITIAL_STD)


class Block(nn.Module):
    """Attention, then an MLP, each on normalized tokens and each added to its input."""

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        self.norm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.drop_path = DropPath(drop_path)
        scale = LayerScale if config.layer_scale else nn.Identity
        self.attention_scale, self.mlp_scale = scale(config), scale(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        tokens = self.drop_path(tokens, lambda kept: self.attention_scale(self.attention(self.norm_before(kept))))
        tokens = self.drop_path(tokens, lambda kept: self.mlp_scale(self.mlp(self.norm_after(kept))))
        return tokens


def compile_blocks(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every block in place; block by block, so that ZeRO's hooks around them stay outside of the graphs.

    All blocks share one list of graphs; after the eighth, torch would go on without compiling.
    """
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for block in module.modules():
        if isinstance(block, Block):
            block.compile(backend=backend)


class Attention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762): softmax(q k^T / sqrt(d)) v."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = (
            projection(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, h, T, d]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        mixed: Tensor = self.dropout(self.o_proj(attended.transpose(1, 2).flatten(-2)))
        return mixed


class MLP(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        hidden: Tensor = self.dropout(self.fc2(F.gelu(self.fc1(tokens))))
        return hidden


class LayerScale(nn.Module):
    """A factor for each channel of a branch, small at first (arXiv 2103.17239)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale))

    def forward(self, branch: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return branch * self.weight


class DropPath(nn.Module):
    """Add a branch to its input, scaled up, for some samples alone (stochastic depth, arXiv 1603.09382).

    At a high rate the branch is computed for those samples alone that have it, a fixed share of the micro-batch
    (arXiv 2304.07193); at a low one it is computed for all, since little could be saved.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drops = rate > 0
        self.kept_share = 1 - rate if rate > PICKS_ABOVE else None
        self.keep: Tensor
        # A tensor: of a number, torch would compile each block for its own and give up after the eighth.
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, tokens: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if not self.drops or not self.training:
            return tokens + branch(tokens)
        if self.kept_share is None:
            kept = torch.rand(len(tokens), 1, 1, device=tokens.device) < self.keep
            return tokens + branch(tokens) * (kept.to(tokens.dtype) / self.keep)
        number = max(1, int(len(tokens) * self.kept_share))
        picked = torch.randperm(len(tokens), device=tokens.device)[:number]
        return tokens.index_add(0, picked, branch(tokens[picked]) * (len(tokens) / number))


def attention_of_cls(block: nn.Module, tokens: Tensor) -> Tensor:
    """[B, T, D] -> [B, h, N]: a block's softmax of CLS over the patches, itself left out."""
    assert isinstance(block, Block)
    attention, tokens = block.attention, block.norm_before(tokens)
    q = attention.q_proj(tokens[:, :1]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [B, h, 1, d]
    k = attention.k_proj(tokens).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [B, h, T, d]
    weights: Tensor = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return weights[:, :, 0, 1:]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * P * P], the patches row by row."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch_size**2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """[B, N, C * P * P] -> [B, C, H, W] of a square image."""
    side = math.isqrt(patches.shape[1])
    grid = patches.reshape(len(patches), side, side, -1, patch_size, patch_size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, side * patch_size, side * patch_size)


def resize_positions(positions: Tensor, num_patches: int) -> Tensor:
    """Interpolate learned positions [1, 1 + N, D] bicubically for another number of patches; CLS keeps its own."""
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(num_patches)
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # type: ignore[no-untyped-call]
    resized = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """[B, N, D], [B, V] -> [B, V, D]: each sample's own tokens."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos_positions(side: int, width: int) -> Tensor:
    """Return fixed 2-d sin-cos positions [1, side * side + 1, width] (arXiv 2104.02057); zeros for CLS."""
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    places = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [side, width / 4]
    rows, columns = places.repeat_interleave(side, dim=0), places.repeat(side, 1)
    grid = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), grid]).float()[None]
