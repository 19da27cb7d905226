"""Masked autoencoding (arXiv 2111.06377): the encoder sees some patches, a light decoder rebuilds the others."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.config import MAEConfig, PreprocessingConfig
from pretrain.data.transforms.color import denormalize
from pretrain.data.transforms.views import EvalView, MaskedView, TrainView, View, augment
from pretrain.model.mae_decoder import MAEDecoder
from pretrain.model.vit import ViT, patchify, take, unpatchify
from pretrain.objectives.objective import Objective

LEAST_VARIANCE = 1e-6  # of a patch's pixels
ONE_OF_THREE = 0.5**0.5  # gain of queries, keys and values: the paper draws them as one layer


class MAEObjective(Objective):
    """Rebuild the hidden patches; the loss is the mean squared error of their pixels.

    Targets are normalized patch by patch, so a decoder that says nothing has a loss near 1.
    """

    def __init__(
        self, config: MAEConfig, encoder: ViT, class_shares: Sequence[float], preprocessing: PreprocessingConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = preprocessing
        self.encoder = encoder
        self.num_visible = config.num_visible(encoder.config)
        self.decoder = MAEDecoder(config.decoder(encoder.config), encoder.config.hidden_size)
        self._initialize()

    def train_view(self, image_size: int) -> View:
        view = TrainView(self.config.augment, image_size)
        return MaskedView(view, self.encoder.config.num_patches)

    def evaluation_view(self) -> View:
        view = EvalView(self.encoder.config.image_size, self.preprocessing.resize_ratio)
        return MaskedView(view, self.encoder.config.num_patches)

    def train_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = augment(batch, self.preprocessing.image_mean, self.preprocessing.image_std)
        return {"loss": self.losses(images, batch["patch_order"]).mean()}

    def evaluation_sums(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self.losses(self.normalized(batch), batch["patch_order"]) * batch["weight"]).sum()}

    def losses(self, images: Tensor, patch_order: Tensor) -> Tensor:
        """Return each sample's loss.

        Args:
            images: normalized, [B, C, H, W].
            patch_order: [B, N].

        Returns:
            float [B].
        """
        predicted, targets = self.rebuild(images, patch_order)
        mean, deviation = self.scale(targets)
        losses: Tensor = (predicted - (targets - mean) / deviation).square().mean(dim=(1, 2))
        return losses

    def rebuild(self, images: Tensor, patch_order: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the decoder says of the hidden patches, and the patches: both float [B, N - V, C * P * P]."""
        visible, hidden = patch_order[:, : self.num_visible], patch_order[:, self.num_visible :]
        tokens = self.encoder(images.to(self.encoder.cls_token.dtype), visible)
        predicted: Tensor = self.decoder(tokens, patch_order)
        return predicted.float(), take(patchify(images, self.encoder.config.patch_size), hidden)

    def scale(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return each patch's mean and deviation [B, N - V, 1]; 0 and 1 if targets stay as they are."""
        if not self.config.normalize_targets:
            return torch.zeros_like(patches[..., :1]), torch.ones_like(patches[..., :1])
        return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + LEAST_VARIANCE).sqrt()

    def pictures(self, batch: dict[str, Tensor]) -> Tensor:
        """Return each image, what the encoder sees of it, what was rebuilt at each patch's brightness, attention."""
        images, patch_order = self.normalized(batch), batch["patch_order"]
        predicted, targets = self.rebuild(images, patch_order)
        level, deviation = self.scale(targets)
        places = patch_order[:, self.num_visible :, None].expand_as(predicted)
        patches, size = patchify(images, self.encoder.config.patch_size), self.encoder.config.patch_size
        seen = unpatchify(patches.scatter(1, places, torch.zeros_like(targets)), size)
        rebuilt = unpatchify(patches.scatter(1, places, predicted * deviation + level), size)
        mean, std = self.preprocessing.image_mean, self.preprocessing.image_std
        columns = [denormalize(column, mean, std).clamp(0, 1) for column in (images, seen, rebuilt)]
        return torch.cat([torch.stack(columns, dim=1), super().pictures(batch)[:, 1:]], dim=1)

    def _initialize(self) -> None:
        """Draw the weights by Xavier's uniform, as the paper (appendix A.1), so that small patches are not drowned.

        With a deviation of 0.02, patches of 48 values are faint beside their positions, and hardly anything is learned.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                is_third = name.endswith(("q_proj", "k_proj", "v_proj"))
                nn.init.xavier_uniform_(module.weight, gain=ONE_OF_THREE if is_third else 1.0)
