"""Masked autoencoding (arXiv 2111.06377): the encoder sees some patches, a light decoder rebuilds the others."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pretrain.config import MAEConfig, PreprocessingConfig
from pretrain.data.augment import EvalView, TrainView, View, augment
from pretrain.data.colour import normalize
from pretrain.data.decode import Jpeg, Pixels
from pretrain.model.mae_decoder import MAEDecoder
from pretrain.model.vit import ViT, patchify, take
from pretrain.objectives.objective import Objective

LEAST_VARIANCE = 1e-6  # of a patch's pixels


@dataclass(frozen=True)
class MaskedView:
    """Another view, and an order of the patches in which the visible ones come first."""

    view: View
    num_patches: int

    def __call__(self, image: Pixels | Jpeg, random: np.random.Generator) -> dict[str, Any]:
        return {**self.view(image, random), "patch_order": random.permutation(self.num_patches)}


class MAEObjective(Objective):
    """Rebuild the hidden patches; the loss is the mean squared error of their pixels.

    Targets are normalised patch by patch, so a decoder that says nothing has a loss near 1.
    """

    def __init__(self, config: MAEConfig, encoder: ViT, num_classes: int, preprocessing: PreprocessingConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = preprocessing
        self.encoder = encoder
        self.num_visible = config.num_visible(encoder.config)
        self.decoder = MAEDecoder(config.decoder(encoder.config), encoder.config.hidden_size)

    def train_view(self) -> View:
        view = TrainView(self.config.augment, self.encoder.config.image_size)
        return MaskedView(view, self.encoder.config.num_patches)

    def evaluation_view(self) -> View:
        view = EvalView(self.encoder.config.image_size, self.preprocessing.resize_ratio)
        return MaskedView(view, self.encoder.config.num_patches)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mean, std = self.preprocessing.image_mean, self.preprocessing.image_std
        if self.training:
            return {"loss": self.losses(augment(batch, mean, std), batch["patch_order"]).mean()}
        images = normalize(batch["image"].float() / 255, mean, std)
        return {"loss": (self.losses(images, batch["patch_order"]) * batch["weight"]).sum()}

    def losses(self, images: Tensor, patch_order: Tensor) -> Tensor:
        """Return each sample's loss.

        Args:
            images: normalised, [B, C, H, W].
            patch_order: [B, N].

        Returns:
            float [B].
        """
        visible, hidden = patch_order[:, : self.num_visible], patch_order[:, self.num_visible :]
        tokens = self.encoder(images.to(self.encoder.cls_token.dtype), visible)
        predicted = self.decoder(tokens, patch_order)
        targets = take(patchify(images, self.encoder.config.patch_size), hidden)
        if self.config.normalize_targets:
            deviation = (targets.var(-1, keepdim=True) + LEAST_VARIANCE).sqrt()
            targets = (targets - targets.mean(-1, keepdim=True)) / deviation
        losses: Tensor = (predicted.float() - targets).square().mean(dim=(1, 2))
        return losses
