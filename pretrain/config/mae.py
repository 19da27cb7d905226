"""The `objective` section with `name: mae`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.config.augment import AugmentConfig
from pretrain.config.model import ModelConfig
from pretrain.config.objective import ObjectiveSection
from pretrain.config.section import Count, Problem, closest_divisor


class MAEConfig(ObjectiveSection):
    """Masked autoencoding (arXiv 2111.06377): reconstruct the pixels of patches that are hidden from the encoder.

    Its decoder has a fixed number of positions, so the size of training images may not change during the run.
    """

    export_types: ClassVar[tuple[str, ...]] = ("vit", "vit_mae")

    name: Literal["mae"] = Field("mae", description="Objective: masked autoencoding.")
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.75, description="Fraction of patches that are hidden.")
    normalize_targets: bool = Field(
        True, description="Whether target pixels are normalized by the mean and deviation of their patch."
    )
    decoder_hidden_size: Count = Field(512, description="Width of the decoder's tokens.")
    decoder_num_hidden_layers: Count = Field(8, description="Number of transformer blocks in the decoder.")
    decoder_num_attention_heads: Count = Field(
        16, description="Attention heads per decoder block; must divide decoder_hidden_size."
    )
    decoder_intermediate_size: Count = Field(2048, description="Width of the decoder's MLPs.")
    augment: AugmentConfig = AugmentConfig(crop_scale=(0.2, 1.0))

    def decoder_config(self, encoder: ModelConfig) -> ModelConfig:
        """Return the decoder's architecture: a ViT over the same patches as `encoder`."""
        return encoder.model_copy(
            update={
                "hidden_size": self.decoder_hidden_size,
                "num_hidden_layers": self.decoder_num_hidden_layers,
                "num_attention_heads": self.decoder_num_attention_heads,
                "intermediate_size": self.decoder_intermediate_size,
                "position_embedding": "sincos",
                "layer_scale": 0.0,
            }
        )

    def num_visible_patches(self, encoder: ModelConfig) -> int:
        """Return the number of patches that the encoder processes."""
        return int(encoder.num_patches * (1 - self.mask_ratio))

    def problems(self) -> Iterator[Problem]:
        width, heads = self.decoder_hidden_size, self.decoder_num_attention_heads
        if width % heads:
            yield Problem(
                ("decoder_num_attention_heads", "decoder_hidden_size"),
                f"{heads} does not divide decoder_hidden_size={width}; {closest_divisor(width, heads)} would",
            )
        if width % 4:
            sentence = f"must be a multiple of 4 for its sincos position embedding, got {width}; change it"
            yield Problem(("decoder_hidden_size",), sentence)
        if self.augment.mixes:
            sentence = "mixup and cutmix mix labels, which mae does not use; set both to 0"
            yield Problem(("augment.mixup", "augment.cutmix"), sentence)

    def model_problems(self, model: ModelConfig) -> Iterator[Problem]:
        if self.num_visible_patches(model) < 1:
            keys = ("objective.mask_ratio", "model.image_size", "model.patch_size")
            yield Problem(keys, f"hides all {model.num_patches} patches of an image; lower it")
