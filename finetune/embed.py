"""Compute the features that a model's classification head would see."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.backbone import new_classifier
from finetune.preprocessor import Preprocessor
from pretrain.data.transforms.decode import ImageArray


class Backbone(nn.Module):
    """The backbone of a Hugging Face folder: it returns what the folder's classification head is given, or would be.

    That is the CLS token after the last LayerNorm for ViT and DeiT, CLS token and mean of the patches for DINOv2, and
    the mean over all positions for networks without a CLS token, such as ResNet and Swin.

    Args:
        folder: Hugging Face folder of any architecture that can be fine-tuned, with or without a trained head.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model: Any = new_classifier(folder, ["unused"], from_scratch=False, freeze_backbone=True)
        head = {name.rpartition(".")[0] for name, value in self.model.named_parameters() if value.requires_grad}
        for name in head:
            self.model.set_submodule(name, nn.Identity())
        self.requires_grad_(True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features [B, D] of normalized pixels [B, 3, H, W]."""
        features: Tensor = self.model(pixel_values=pixels).logits
        return features


@torch.no_grad()
def embed(backbone: nn.Module, preprocessor: Preprocessor, images: Sequence[ImageArray]) -> Tensor:
    """Return the features of a batch, float [B, D] on the CPU.

    Args:
        backbone: Module that turns normalized pixels [B, 3, H, W] into features [B, D].
        preprocessor: Preprocessing of the model.
        images: Decoded images, uint8 [H, W, 3], of any sizes.
    """
    pixels = preprocessor.batch(images).to(next(backbone.parameters()).device)
    features: Tensor = backbone(pixels)
    return features.float().cpu()
