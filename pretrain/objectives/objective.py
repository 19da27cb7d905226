"""What every objective offers to the loop, which knows none by name."""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.config import PreprocessingConfig
from pretrain.data.transforms.color import normalize
from pretrain.data.transforms.views import View
from pretrain.model.vit import ViT


class Objective(nn.Module):
    """A batch in, a dict of scalars with "loss" out.

    In training mode the scalars are means over the batch. In evaluation mode they are sums over its samples, each
    times its "weight", so that any number of ranks and batches adds up to the same mean. `answers` asks for something
    else for a while: "features" [B, D], CLS of the encoder, or "pictures".

    Attributes:
        encoder: whose weights leave the run.
        preprocessing: of images in evaluation.
        group_size: samples that must be in one micro-batch.
        answers: what is asked for.
    """

    encoder: ViT
    preprocessing: PreprocessingConfig
    group_size: int = 1
    answers: Literal["losses", "features", "pictures"] = "losses"

    @abstractmethod
    def train_view(self, image_size: int) -> View:
        """Return what a worker makes of an image for training, so many pixels a side; it must pickle."""

    @abstractmethod
    def evaluation_view(self) -> View:
        """Return what a worker makes of an image for evaluation; it must pickle."""

    @abstractmethod
    def train_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss and what else is worth a curve, as means."""

    @abstractmethod
    def evaluation_sums(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the same as sums over the samples that have a weight."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Answer as the mode asks: an engine, and ZeRO's hooks, know no other entry."""
        if self.answers == "pictures":
            return {"pictures": self.pictures(batch)}
        if self.answers == "features":
            encoder = self.encoder
            return {"features": encoder(self.normalized(batch).to(encoder.cls_token.dtype))[:, 0].float()}
        return self.train_losses(batch) if self.training else self.evaluation_sums(batch)

    def normalized(self, batch: dict[str, Tensor]) -> Tensor:
        """Return images as evaluation and the exported processor have them, [B, C, H, W]."""
        pixels = batch["image"].float() / 255
        return normalize(pixels, self.preprocessing.image_mean, self.preprocessing.image_std)

    def pictures(self, batch: dict[str, Tensor]) -> Tensor:
        """Return each image and, beside it, what has been learned of it: [B, columns, C, H, W], from 0 to 1.

        Here: what each head of the last block takes into CLS from where, the most as white.
        """
        images, encoder = batch["image"].float() / 255, self.encoder
        attention = encoder(self.normalized(batch).to(encoder.cls_token.dtype), attends=True).float()
        size = encoder.config.patch_size
        maps = attention / attention.amax(dim=2, keepdim=True)  # [B, h, N]
        side = images.shape[-1] // size
        maps = maps.reshape(*maps.shape[:2], side, side).repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
        columns = [images, *(one[:, None].expand_as(images) for one in maps.unbind(dim=1))]
        return torch.stack(columns, dim=1)

    def after_warm_start(self) -> None:
        """Hear that `encoder` has been given the weights that the run starts from."""

    def before_step(self, progress: float) -> None:
        """Hear how much of the run is over, from 0 to 1, before each step."""

    def after_step(self, bad: Tensor) -> None:
        """Do what follows an optimizer step, such as moving an average of the weights.

        Args:
            bad: 1 where the step was skipped, else 0; a scalar on the device.
        """
