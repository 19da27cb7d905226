"""The interface between an objective and the training loop, which knows no objective by name.

Letters in shapes: B images in the batch, C channels, H height and W width in pixels, D hidden size, h attention heads,
N patches.
"""

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pretrain.config import PreprocessingConfig
from pretrain.data.transforms.batch import Batch, augment
from pretrain.data.transforms.color import normalize
from pretrain.data.transforms.views import View
from pretrain.model.compiling import graph
from pretrain.model.vit import ViT

Output: TypeAlias = Literal["losses", "features", "pictures"]


class Objective(nn.Module, ABC):
    """Base class of all objectives: a batch in, a dict of scalars with "loss" out.

    A subclass sets `encoder` and `preprocessing` in its constructor and implements the four abstract methods. Python
    refuses to instantiate one that lacks a method.

    Attributes:
        encoder: Vision Transformer whose weights are exported.
        preprocessing: Resize ratio, mean and standard deviation of images in evaluation.
        group_size: Number of consecutive samples that must stay in one micro-batch, such as 2 for mixup.
        several_sizes: Whether a micro-batch has images of several sizes.
    """

    encoder: ViT
    preprocessing: PreprocessingConfig
    group_size: int = 1
    several_sizes: bool = False

    @abstractmethod
    def train_view(self, image_size: int) -> View:
        """Return the picklable transform that data workers apply to training images.

        Args:
            image_size: Height and width in pixels of the images that the model is given.
        """

    @abstractmethod
    def evaluation_view(self) -> View:
        """Return the picklable transform that data workers apply to images in evaluation."""

    @abstractmethod
    def train_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and any further scalars worth logging, each the mean over the batch."""

    @abstractmethod
    def evaluation_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and any further metrics, each summed over the samples after multiplying by "weight" [B]."""

    def forward(self, batch: Batch, output: Output = "losses") -> dict[str, Tensor]:
        """Compute one kind of output. DeepSpeed's engine and its ZeRO hooks support no other entry point.

        Args:
            batch: Batch on the model's device.
            output: Kind of output to compute, one of the three under Returns.

        Returns:
            "losses": in training mode the means of `train_losses`; in evaluation mode the sums of `evaluation_sums`,
                which add up to the same mean for any number of ranks and batches.
            "features": "features", float [B, D], the CLS token of the encoder for the whole image.
            "pictures": "pictures", float [B, columns, C, H, W] between 0 and 1.
        """
        if output == "pictures":
            return {"pictures": self.pictures(batch)}
        if output == "features":
            images = self.normalized_images(batch).to(self.encoder.cls_token.dtype)
            return {"features": self.encoder(images, output="cls")[:, 0].float()}
        return self.train_losses(batch) if self.training else self.evaluation_sums(batch)

    @graph(uses_parameters=False)
    def augmented_images(self, batch: Batch) -> Tensor:
        """Return the augmented and normalized images, float32 [B, C, H, W]."""
        return augment(batch, self.preprocessing.image_mean, self.preprocessing.image_std)

    def normalized_images(self, batch: Batch) -> Tensor:
        """Return the images [B, C, H, W] normalized as the exported image processor does."""
        pixels = batch["image"].float() / 255
        return normalize(pixels, self.preprocessing.image_mean, self.preprocessing.image_std)

    def pictures(self, batch: Batch) -> Tensor:
        """Return each image followed by pictures of what the model has learned from it.

        This implementation shows one attention map per head of the last block: how much the CLS token attends to each
        patch, scaled so that the largest value is white.

        Returns:
            float [B, 1 + h, C, H, W], between 0 and 1.
        """
        images, encoder = batch["image"].float() / 255, self.encoder
        attention = encoder(self.normalized_images(batch).to(encoder.cls_token.dtype), output="attention").float()
        size = encoder.config.patch_size
        maps = attention / attention.amax(dim=2, keepdim=True)  # [B, h, N]
        side = images.shape[-1] // size
        maps = maps.reshape(*maps.shape[:2], side, side).repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
        columns = [images, *(one[:, None].expand_as(images) for one in maps.unbind(dim=1))]
        return torch.stack(columns, dim=1)

    def picture_headings(self) -> list[str]:
        """Return the heading of each column of `pictures`."""
        return ["original", *(f"head {head + 1} attention" for head in range(self.encoder.config.num_attention_heads))]

    def after_warm_start(self) -> None:  # only a teacher and its student need it
        """Update whatever depends on the encoder's weights after they were loaded from `init_from`."""

    def before_step(self, progress: float) -> None:  # only schedules of an objective's own need it
        """Prepare an optimizer step.

        Args:
            progress: Share of the run's steps that are done, from 0 to 1.
        """

    def after_step(self, skipped: Tensor) -> None:  # only a teacher needs it
        """Update whatever follows the weights after an optimizer step, such as a moving average of them.

        Args:
            skipped: 1 if the step was skipped, else 0; a scalar on the device.
        """
