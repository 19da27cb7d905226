"""A plain pre-norm Vision Transformer (arXiv 2010.11929).

Letters in shapes: B images, C channels, H height and W width in pixels, P patch size, N patches, V visible patches,
T = N + 1 tokens (CLS is the first), D hidden size, h heads, d = D / h.

Query, key and value are separate layers, and names follow transformers' `vit`, so that exporting only renames weights.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelConfig
from pretrain.model.compiling import graph

INITIAL_STD = 0.02
Output: TypeAlias = Literal["tokens", "cls", "attention"]
# Above this drop path rate, a branch is computed only for the samples that keep it.
SUBSET_ABOVE = 0.1


class ViT(nn.Module):
    """A Vision Transformer that turns images into normalized tokens; heads belong to the objectives.

    Args:
        config: Architecture.
        activation_checkpointing: Whether to recompute each block's activations in the backward pass.
    """

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
        mask: tuple[Tensor, Tensor] | None = None,
        output: Output = "tokens",
    ) -> Tensor:
        """Encode images.

        Args:
            images: Normalized images [B, C, H, W]. At sizes other than the config's, positions are interpolated.
            visible: Indices [B, V] of the patches to encode; None encodes all.
            mask: Boolean mask [B, N] and the token [1, 1, D] that replaces masked patches.
            output: Kind of result. "cls" saves most of the last block's cost where no other token is needed.

        Returns:
            "tokens": tokens [B, T, D] ([B, 1 + V, D] with `visible`).
            "cls": the first of them, [B, 1, D].
            "attention": attention weights [B, h, N] of the last block from CLS to the patches.
        """
        tokens = self.embed(images, visible, mask)
        for layer in self.layers:
            kind = output if layer is self.layers[-1] else "tokens"
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(layer, tokens, kind, use_reentrant=False)
            else:
                tokens = layer(tokens, kind)
        return tokens if output == "attention" else self.normalize(tokens)

    @graph()
    def embed(self, images: Tensor, visible: Tensor | None = None, mask: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Embed patches, add positions and prepend CLS. Arguments and shapes are those of `forward`."""
        patches, positions = patchify(images, self.config.patch_size), self.position_embedding
        if patches.shape[1] != self.config.num_patches:
            positions = resize_positions(positions.float(), images.shape[-1] // self.config.patch_size)
        positions = positions.to(images.dtype)  # DeepSpeed leaves buffers in fp32
        patch_positions = positions[:, 1:]
        if visible is not None:
            patches = take(patches, visible)
            patch_positions = take(patch_positions.expand(len(images), -1, -1), visible)
        embedded = self.patch_embedding(patches)
        if mask is not None:
            is_masked, mask_token = mask
            embedded = torch.where(is_masked[..., None], mask_token.to(embedded.dtype), embedded)
        cls_token = (self.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        tokens: Tensor = self.dropout(torch.cat([cls_token, embedded + patch_positions], dim=1))
        return tokens

    @graph()
    def normalize(self, tokens: Tensor) -> Tensor:
        """Normalize the tokens [B, T, D] of the last block."""
        normalized: Tensor = self.norm(tokens)
        return normalized

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=INITIAL_STD)
        if isinstance(self.position_embedding, nn.Parameter):
            nn.init.trunc_normal_(self.position_embedding, std=INITIAL_STD)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each with a residual connection.

    Args:
        config: Architecture.
        drop_path: Rate at which each branch is dropped in training.
    """

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        self.norm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.drop_path = DropPath(drop_path)
        scale = LayerScale if config.layer_scale else nn.Identity
        self.attention_scale, self.mlp_scale = scale(config), scale(config)

    @graph()
    def forward(self, tokens: Tensor, output: Output = "tokens") -> Tensor:
        """Transform tokens. ZeRO 3 gathers the parameters of a block for this method, so no other can use them.

        Args:
            tokens: Tokens [B, T, D].
            output: Kind of result, one of the three under Returns.

        Returns:
            "tokens": tokens [B, T, D].
            "cls": only the first of them, [B, 1, D]. The others take part as keys and values.
            "attention": attention weights [B, h, N] from CLS to the patches.
        """
        if output == "attention":
            return cls_attention(self, tokens)
        num_queries = 1 if output == "cls" else tokens.shape[1]

        def attend(kept: Tensor) -> Tensor:
            attended: Tensor = self.attention_scale(self.attention(self.norm_before(kept), num_queries))
            return attended

        queries = self.drop_path(tokens[:, :num_queries], tokens, attend)
        transformed: Tensor = self.drop_path(
            queries, queries, lambda kept: self.mlp_scale(self.mlp(self.norm_after(kept)))
        )
        return transformed


class Attention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762): softmax(q k^T / sqrt(d)) v.

    Args:
        config: Architecture.
    """

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

    def forward(self, tokens: Tensor, num_queries: int) -> Tensor:
        """Attend from the first Q tokens to all tokens: [B, T, D] -> [B, Q, D]."""
        if num_queries == tokens.shape[1]:
            q, k, v = self._project(tokens, self.q_proj, self.k_proj, self.v_proj)
        else:
            [q] = self._project(tokens[:, :num_queries], self.q_proj)
            k, v = self._project(tokens, self.k_proj, self.v_proj)
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        mixed: Tensor = self.dropout(self.o_proj(attended.transpose(1, 2).flatten(-2)))
        return mixed

    def _project(self, tokens: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Apply several layers to tokens [B, T, D] and split the heads; return [B, h, T, d] for each layer.

        One product in place of several starts fewer kernels. The layers stay apart, as in exported folders.
        """
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        heads = F.linear(tokens, weight, bias).view(*tokens.shape[:2], len(layers), self.num_heads, -1)
        return heads.permute(2, 0, 3, 1, 4).unbind(0)


class MLP(nn.Module):
    """Two linear layers with the exact GELU between them.

    Args:
        config: Architecture.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token by itself: [B, T, D] -> [B, T, D]."""
        hidden: Tensor = self.dropout(self.fc2(F.gelu(self.fc1(tokens))))
        return hidden


class LayerScale(nn.Module):
    """A learned factor per channel of a branch, small at first (arXiv 2103.17239).

    Args:
        config: Architecture; `layer_scale` is the initial value.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale))

    def forward(self, branch: Tensor) -> Tensor:
        """Scale the channels of a branch [B, T, D]."""
        return branch * self.weight


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): add a branch to its input only for some samples, scaled to keep the mean.

    At rates above 0.1, the branch is computed only for a random subset of the micro-batch of fixed size (arXiv
    2304.07193), which saves its cost for the others. At lower rates it is computed for all samples and then masked.

    Args:
        rate: Probability of dropping the branch of a sample.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drops = rate > 0
        self.kept_fraction = 1 - rate if rate > SUBSET_ABOVE else None
        self.keep: Tensor
        # With a Python number, torch would compile a graph for each block's own rate and stop after the eighth.
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, residual: Tensor, tokens: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `residual` [B, Q, D] plus `branch(tokens)` for the samples that keep it.

        Args:
            residual: Tokens to which the branch is added.
            tokens: Input of the branch, [B, T, D].
            branch: Function of the tokens of any number of samples that returns Q tokens for each.
        """
        if not self.drops or not self.training:
            return residual + branch(tokens)
        if self.kept_fraction is None:
            kept = torch.rand(len(tokens), 1, 1, device=tokens.device) < self.keep
            return residual + branch(tokens) * (kept.to(tokens.dtype) / self.keep)
        num_kept = max(1, int(len(tokens) * self.kept_fraction))
        subset = torch.randperm(len(tokens), device=tokens.device)[:num_kept]
        return residual.index_add(0, subset, branch(tokens[subset]) * (len(tokens) / num_kept))


def cls_attention(block: Block, tokens: Tensor) -> Tensor:
    """Return a block's attention weights [B, h, N] from CLS to the patches, for its input tokens [B, T, D]."""
    attention, tokens = block.attention, block.norm_before(tokens)
    q = attention.q_proj(tokens[:, :1]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [B, h, 1, d]
    k = attention.k_proj(tokens).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [B, h, T, d]
    weights: Tensor = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return weights[:, :, 0, 1:]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [B, C, H, W] into patches [B, N, C * P * P], row by row."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch_size**2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Assemble patches [B, N, C * P * P] to square images [B, C, H, W]: the inverse of `patchify`."""
    side = math.isqrt(patches.shape[1])
    grid = patches.reshape(len(patches), side, side, -1, patch_size, patch_size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, side * patch_size, side * patch_size)


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Interpolate position embeddings bicubically to another number of patches; CLS keeps its own.

    Args:
        positions: Position embeddings [1, 1 + N, D] of a square grid, CLS first.
        side: Number of patches along a side of another square grid.

    Returns:
        Position embeddings [1, 1 + side * side, D].
    """
    old = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # type: ignore[no-untyped-call]
    if torch.are_deterministic_algorithms_enabled():
        resized = _resize_by_products(grid, side)
    else:
        resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def _resize_by_products(grid: Tensor, side: int) -> Tensor:
    """Interpolate a square grid [1, D, old, old] bicubically to [1, D, side, side] by two matrix products.

    On a GPU, the backward pass of F.interpolate is not deterministic, and PyTorch refuses it if it must be.
    """
    identity = torch.eye(grid.shape[-1], dtype=grid.dtype, device=grid.device)[None, None]
    along_one_axis = F.interpolate(identity, size=(side, grid.shape[-1]), mode="bicubic", align_corners=False)[0, 0]
    return along_one_axis @ grid @ along_one_axis.T


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Gather each sample's own tokens: [B, N, D] at indices [B, V] -> [B, V, D]."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos_positions(side: int, width: int) -> Tensor:
    """Return fixed 2-D sine-cosine position embeddings (arXiv 2104.02057).

    Args:
        side: Patches along each side of a square image.
        width: Width of the tokens, a multiple of 4.

    Returns:
        Position embeddings [1, 1 + side * side, width]; that of CLS is zero.
    """
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [side, width / 4]
    rows, columns = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
    grid = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), grid]).float()[None]
