"""Supervised classification of the CLS token: softmax or binary cross-entropy, label smoothing, mixup and cutmix.

Letters in shapes: B images, C channels, H height and W width in pixels, K classes, N patches, V visible patches.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pretrain.config import PreprocessingConfig, SupervisedConfig
from pretrain.data.transforms.batch import Batch
from pretrain.data.transforms.mixup import binary_cross_entropy, cross_entropy, mix_neighbors, mixed_loss
from pretrain.data.transforms.views import EvalView, PatchOrderView, TrainView, View
from pretrain.errors import UserError
from pretrain.model.compiling import graph
from pretrain.model.vit import ViT
from pretrain.objectives.objective import Objective

HEAD_STD = 0.01
LOSSES: dict[tuple[str, str], Callable[[Tensor, Tensor, float], Tensor]] = {
    ("cross_entropy", "mean"): cross_entropy,
    ("binary_cross_entropy", "mean"): binary_cross_entropy,
    ("binary_cross_entropy", "sum"): partial(binary_cross_entropy, reduction="sum"),
}


class SupervisedObjective(Objective):
    """Classify whole images with a linear head on the CLS token.

    The head's weights start near zero, so the first cross-entropy is close to log(number of classes).

    Args:
        config: Loss, class weights, label smoothing, patch dropout and augmentation.
        encoder: Vision Transformer to train.
        class_shares: Share of each class in the training data; its length is the number of classes.
        preprocessing: Resize ratio, mean and standard deviation of images in evaluation.
    """

    def __init__(
        self, config: SupervisedConfig, encoder: ViT, class_shares: Sequence[float], preprocessing: PreprocessingConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = preprocessing
        self.encoder = encoder
        self.loss = LOSSES[config.loss, config.loss_reduction]
        self.group_size = 2 if config.augment.mixes else 1
        self.class_weights: Tensor
        weights = build_class_weights(config.class_weights, class_shares)
        self.register_buffer("class_weights", weights, persistent=False)
        self.classifier = nn.Linear(encoder.config.hidden_size, len(class_shares))
        nn.init.trunc_normal_(self.classifier.weight, std=HEAD_STD)
        nn.init.constant_(self.classifier.bias, config.head_bias)

    def train_view(self, image_size: int) -> View:
        view = TrainView(self.config.augment, image_size)
        num_patches = (image_size // self.encoder.config.patch_size) ** 2
        return PatchOrderView(view, num_patches) if self.config.patch_dropout else view

    def evaluation_view(self) -> View:
        return EvalView(self.encoder.config.image_size, self.preprocessing.resize_ratio)

    def logits(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the logits, float [B, K].

        Args:
            images: Normalized images, float [B, C, H, W].
            visible: Indices of the patches that the encoder is given, int [B, V]; None for all patches.
        """
        tokens = self.encoder(images.to(self.classifier.weight.dtype), visible, output="cls")
        logits: Tensor = self.classifier(tokens[:, 0])
        return logits.float()

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each sample, float [B], multiplied by the weight of its class."""
        losses = self.loss(logits, labels, self.config.label_smoothing)
        return losses * self.class_weights[labels] if self.config.class_weights != "none" else losses

    def train_losses(self, batch: Batch) -> dict[str, Tensor]:
        images, own_share = self.mixed_images(batch)
        visible = None
        if self.config.patch_dropout:
            num_patches = batch["patch_order"].shape[1]
            visible = batch["patch_order"][:, : num_patches - int(num_patches * self.config.patch_dropout)]
        return {"loss": self.mean_loss(self.logits(images, visible), batch["label"], own_share)}

    @graph(uses_parameters=False)
    def mixed_images(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the augmented images [B, C, H, W] and, with mixup or cutmix, the share [B] of each image in itself."""
        images = self.augmented_images(batch)
        return mix_neighbors(images, batch) if self.config.augment.mixes else (images, None)

    @graph(uses_parameters=False)
    def mean_loss(self, logits: Tensor, labels: Tensor, own_share: Tensor | None) -> Tensor:
        """Return the mean loss of a batch for logits [B, K], labels [B] and what `mixed_images` returns."""
        if own_share is not None:
            return mixed_loss(partial(self.losses, logits), labels, own_share)
        return self.losses(logits, labels).mean()

    def evaluation_sums(self, batch: Batch) -> dict[str, Tensor]:
        labels, weight = batch["label"], batch["weight"]
        logits = self.logits(self.normalized_images(batch))
        correct = (logits.argmax(dim=1) == labels).float()
        return {
            "loss": (self.loss(logits, labels, 0.0) * weight).sum(),
            "top1": (correct * weight).sum(),
        }


def build_class_weights(class_weights: str | list[float], class_shares: Sequence[float]) -> Tensor:
    """Return the loss weight of each class, float [K].

    Args:
        class_weights: "none" for ones; "balanced" for 1 / (K * share), the inverse frequency with mean 1 over the
            samples; or a list with one weight per class.
        class_shares: Share of each class in the training data.

    Raises:
        UserError: If the list's length is not the number of classes.
    """
    if isinstance(class_weights, list):
        if len(class_weights) != len(class_shares):
            raise UserError(
                f"objective.class_weights: {len(class_weights)} weights for {len(class_shares)} classes; "
                "give one weight per class"
            )
        return torch.tensor(class_weights)
    shares = torch.tensor(class_shares).clamp_min(torch.finfo(torch.float32).tiny)
    return 1 / (len(class_shares) * shares) if class_weights == "balanced" else torch.ones_like(shares)
