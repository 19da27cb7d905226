"""What every objective offers to the loop, which knows none by name."""

from abc import abstractmethod

from torch import Tensor, nn

from pretrain.data.augment import View
from pretrain.model.vit import ViT


class Objective(nn.Module):
    """A batch in, a dict of scalars with "loss" out.

    In training mode the scalars are means over the batch. In evaluation mode they are sums over its samples, each
    times its "weight", so that any number of ranks and batches adds up to the same mean.
    """

    encoder: ViT
    together: int = 1  # samples that must be in one micro-batch

    @abstractmethod
    def train_view(self) -> View:
        """Return what a worker makes of an image for training; it must pickle."""

    @abstractmethod
    def evaluation_view(self) -> View:
        """Return what a worker makes of an image for evaluation; it must pickle."""

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss and what else is worth a curve."""

    def after_step(self, step: int) -> None:
        """Do what follows an optimizer step, such as moving an average of the weights."""

    def encoder_for_export(self) -> ViT:
        """Return the encoder whose weights leave the run."""
        return self.encoder
