"""Supervised classification: cross-entropy on CLS, with label smoothing, mixup and cutmix."""

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import PreprocessingConfig, SupervisedConfig
from pretrain.data.augment import EvalView, TrainView, View, augment
from pretrain.data.mixing import mix_neighbours, mixed_cross_entropy
from pretrain.model.vit import ViT
from pretrain.objectives.objective import Objective

HEAD_STD = 0.01


class SupervisedObjective(Objective):
    """Classify the whole image. The head starts near zero, so the first loss is close to log(number of classes)."""

    def __init__(
        self, config: SupervisedConfig, encoder: ViT, num_classes: int, preprocessing: PreprocessingConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = preprocessing
        self.encoder = encoder
        self.together = 2 if config.augment.mixes else 1
        self.classifier = nn.Linear(encoder.config.hidden_size, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=HEAD_STD)
        nn.init.zeros_(self.classifier.bias)

    def train_view(self) -> View:
        return TrainView(self.config.augment, self.encoder.config.image_size)

    def evaluation_view(self) -> View:
        return EvalView(self.encoder.config.image_size, self.preprocessing.resize_ratio)

    def logits(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], from CLS after the last norm."""
        tokens = self.encoder(images.to(self.classifier.weight.dtype))
        logits: Tensor = self.classifier(tokens[:, 0])
        return logits.float()

    def train_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels, smoothing = batch["label"], self.config.label_smoothing
        images = augment(batch, self.preprocessing.image_mean, self.preprocessing.image_std)
        if not self.config.augment.mixes:
            return {"loss": F.cross_entropy(self.logits(images), labels, label_smoothing=smoothing)}
        images, own_share = mix_neighbours(images, batch)
        return {"loss": mixed_cross_entropy(self.logits(images), labels, own_share, smoothing)}

    def evaluation_sums(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels, weight = batch["label"], batch["weight"]
        logits = self.logits(self.normalized(batch))
        correct = (logits.argmax(dim=1) == labels).float()
        return {
            "loss": (F.cross_entropy(logits, labels, reduction="none") * weight).sum(),
            "top1": (correct * weight).sum(),
        }
