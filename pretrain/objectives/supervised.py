"""Supervised classification: cross-entropy on CLS, with label smoothing, mixup and cutmix."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import PreprocessingConfig, SupervisedConfig
from pretrain.data.augment import EvalView, TrainView, View, augment, mix_neighbours, neighbours, normalize
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
        self.classifier = nn.Linear(encoder.config.hidden_size, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=HEAD_STD)
        nn.init.zeros_(self.classifier.bias)

    def train_view(self) -> View:
        return TrainView(self.config.augment, self.encoder.config.image_size)

    def evaluation_view(self) -> View:
        return EvalView(self.encoder.config.image_size, self.preprocessing.resize_ratio)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._train(batch) if self.training else self._evaluate(batch)

    def logits(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], from CLS after the last norm."""
        tokens = self.encoder(images.to(self.classifier.weight.dtype))
        logits: Tensor = self.classifier(tokens[:, 0])
        return logits.float()

    def _train(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """s CE(y) + (1 - s) CE(neighbour's y), where s is the image's own share of its pixels."""
        labels = batch["label"]
        images = augment(batch, self.preprocessing.image_mean, self.preprocessing.image_std)
        if not self.config.augment.mixes:
            return {"loss": self._cross_entropy(self.logits(images), labels).mean()}
        images, own_share = mix_neighbours(images, batch)
        logits = self.logits(images)
        own, other = self._cross_entropy(logits, labels), self._cross_entropy(logits, neighbours(labels))
        return {"loss": torch.lerp(other, own, own_share).mean()}

    def _evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels, weight = batch["label"], batch["weight"]
        logits = self.logits(
            normalize(batch["image"].float() / 255, self.preprocessing.image_mean, self.preprocessing.image_std)
        )
        correct = (logits.argmax(dim=1) == labels).float()
        return {
            "loss": (F.cross_entropy(logits, labels, reduction="none") * weight).sum(),
            "top1": (correct * weight).sum(),
        }

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return -sum_k q_k log p_k for each sample, q = (1 - e) onehot(y) + e / classes (arXiv 1512.00567)."""
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.config.label_smoothing)
