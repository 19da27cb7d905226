"""The `model` section: architecture of the Vision Transformer."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pretrain.config.section import Count, NonNegative, Positive, Problem, Rate, Section, closest_divisor


class ModelConfig(Section):
    """A plain pre-norm Vision Transformer (arXiv 2010.11929). The defaults are ViT-B/16 at 224 pixels."""

    hidden_size: Count = Field(768, description="Width of the tokens.")
    num_hidden_layers: Count = Field(12, description="Number of transformer blocks.")
    num_attention_heads: Count = Field(12, description="Attention heads per block; must divide hidden_size.")
    mlp_ratio: Positive | None = Field(
        None, description="Width of the MLP relative to hidden_size; null means 4 unless intermediate_size is set."
    )
    intermediate_size: Count | None = Field(
        None, description="Width of the MLP's hidden layer; null means mlp_ratio x hidden_size."
    )
    patch_size: Count = Field(16, description="Side of a square patch in pixels; must divide image_size.")
    image_size: Count = Field(224, description="Side of the square input image in pixels.")
    num_channels: Literal[3] = Field(3, description="Color channels of an image.")
    position_embedding: Literal["learned", "sincos"] = Field(
        "learned",
        description='Position embedding: "learned", or "sincos" for fixed 2-D sine-cosine values (arXiv 2104.02057).',
    )
    dropout: Rate = Field(0.0, description="Dropout rate after the embeddings, each attention and each MLP.")
    attention_dropout: Rate = Field(0.0, description="Dropout rate of the attention weights.")
    drop_path: Rate = Field(
        0.0,
        description="Stochastic depth rate of the last block (arXiv 1603.09382), rising linearly from 0 at the first.",
    )
    layer_scale: NonNegative = Field(
        0.0, description="Initial value of LayerScale's per-channel factors (arXiv 2103.17239); 0 disables LayerScale."
    )
    layer_norm_eps: Positive = Field(1e-6, description="Epsilon of every LayerNorm.")

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.intermediate_size or int(self.hidden_size * (self.mlp_ratio or 4.0))

    @property
    def num_patches(self) -> int:
        """Number of patches in an image."""
        return (self.image_size // self.patch_size) ** 2

    def problems(self) -> Iterator[Problem]:
        if self.image_size % self.patch_size:
            below = max(self.image_size - self.image_size % self.patch_size, self.patch_size)
            yield Problem(
                ("patch_size", "image_size"),
                f"{self.patch_size} does not divide image_size={self.image_size}; image_size={below} would fit",
            )
        if self.hidden_size % self.num_attention_heads:
            yield Problem(
                ("num_attention_heads", "hidden_size"),
                f"{self.num_attention_heads} does not divide hidden_size={self.hidden_size}; "
                f"{closest_divisor(self.hidden_size, self.num_attention_heads)} would",
            )
        if self.position_embedding == "sincos" and self.hidden_size % 4:
            yield Problem(
                ("hidden_size", "position_embedding"),
                f"must be a multiple of 4 with position_embedding=sincos, got {self.hidden_size}; change one of them",
            )
        if self.intermediate_size is not None and self.mlp_ratio is not None:
            yield Problem(("mlp_ratio", "intermediate_size"), "conflicts with intermediate_size; remove one of the two")
        if self.mlp_size < 1:
            yield Problem(
                ("mlp_ratio", "hidden_size"),
                f"mlp_ratio x hidden_size must be at least 1, got {self.mlp_ratio} x {self.hidden_size}; "
                "increase mlp_ratio",
            )
