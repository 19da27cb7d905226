"""Masked autoencoding (MAE, arXiv 2111.06377): the encoder sees some patches, a small decoder predicts the others.

Letters in shapes: B images, C channels, H height and W width in pixels, P patch size, N patches, V visible patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.config import MAEConfig, PreprocessingConfig
from pretrain.data.transforms.batch import Batch
from pretrain.data.transforms.color import denormalize
from pretrain.data.transforms.views import EvalView, PatchOrderView, TrainView, View
from pretrain.model.compiling import graph
from pretrain.model.mae_decoder import MAEDecoder
from pretrain.model.vit import ViT, patchify, take, unpatchify
from pretrain.objectives.objective import Objective

MIN_VARIANCE = 1e-6  # added to the variance of a patch's pixels
QKV_GAIN = 0.5**0.5  # the paper initializes queries, keys and values as one layer, which halves the variance


class MAEObjective(Objective):
    """Predict the hidden patches; the loss is the mean squared error of their pixels.

    Each patch's target has mean 0 and variance 1 (unless `normalize_targets` is off), so a decoder that predicts a
    constant has a loss near 1.

    Args:
        config: Mask ratio, targets, augmentation and size of the decoder.
        encoder: Vision Transformer to train.
        class_shares: Not used, because this objective needs no labels.
        preprocessing: Resize ratio, mean and standard deviation of images in evaluation.
    """

    def __init__(
        self, config: MAEConfig, encoder: ViT, class_shares: Sequence[float], preprocessing: PreprocessingConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = preprocessing
        self.encoder = encoder
        self.num_visible = config.num_visible_patches(encoder.config)
        self.decoder = MAEDecoder(config.decoder_config(encoder.config), encoder.config.hidden_size)
        self._initialize()

    def train_view(self, image_size: int) -> View:
        view = TrainView(self.config.augment, image_size)
        return PatchOrderView(view, self.encoder.config.num_patches)

    def evaluation_view(self) -> View:
        view = EvalView(self.encoder.config.image_size, self.preprocessing.resize_ratio)
        return PatchOrderView(view, self.encoder.config.num_patches)

    def train_losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.losses(self.augmented_images(batch), batch["patch_order"]).mean()}

    def evaluation_sums(self, batch: Batch) -> dict[str, Tensor]:
        losses = self.losses(self.normalized_images(batch), batch["patch_order"])
        return {"loss": (losses * batch["weight"]).sum()}

    def losses(self, images: Tensor, patch_order: Tensor) -> Tensor:
        """Return the loss of each sample.

        Args:
            images: Normalized images, float [B, C, H, W].
            patch_order: Permutation of each image's patches, int [B, N]; the first V are visible to the encoder.

        Returns:
            float [B].
        """
        return self.squared_errors(self.predict(images, patch_order), images, patch_order)

    def predict(self, images: Tensor, patch_order: Tensor) -> Tensor:
        """Return the decoder's prediction of the hidden patches, [B, N - V, C * P * P]."""
        tokens = self.encoder(images.to(self.encoder.cls_token.dtype), patch_order[:, : self.num_visible])
        predicted: Tensor = self.decoder(tokens, patch_order)
        return predicted

    @graph(uses_parameters=False)
    def squared_errors(self, predicted: Tensor, images: Tensor, patch_order: Tensor) -> Tensor:
        """Return the mean squared error of each sample's predicted patches, float [B]."""
        targets = self.hidden_patches(images, patch_order)
        mean, std = self.target_scale(targets)
        errors: Tensor = (predicted.float() - (targets - mean) / std).square().mean(dim=(1, 2))
        return errors

    def hidden_patches(self, images: Tensor, patch_order: Tensor) -> Tensor:
        """Return the patches that are hidden from the encoder, float [B, N - V, C * P * P]."""
        return take(patchify(images, self.encoder.config.patch_size), patch_order[:, self.num_visible :])

    def target_scale(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [B, N - V, 1] for normalizing patches; 0 and 1 if that is off."""
        if not self.config.normalize_targets:
            return torch.zeros_like(patches[..., :1]), torch.ones_like(patches[..., :1])
        return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + MIN_VARIANCE).sqrt()

    def pictures(self, batch: Batch) -> Tensor:
        """Return four kinds of columns: the image, its visible patches, the reconstruction and the attention maps.

        Predicted patches are shown with the mean and standard deviation of the true ones, because the decoder predicts
        normalized pixels.
        """
        images, patch_order = self.normalized_images(batch), batch["patch_order"]
        predicted = self.predict(images, patch_order).float()
        targets = self.hidden_patches(images, patch_order)
        mean, std = self.target_scale(targets)
        hidden = patch_order[:, self.num_visible :, None].expand_as(predicted)
        patches, size = patchify(images, self.encoder.config.patch_size), self.encoder.config.patch_size
        visible = unpatchify(patches.scatter(1, hidden, torch.zeros_like(targets)), size)
        reconstructed = unpatchify(patches.scatter(1, hidden, predicted * std + mean), size)
        channels = self.preprocessing.image_mean, self.preprocessing.image_std
        columns = [denormalize(column, *channels).clamp(0, 1) for column in (images, visible, reconstructed)]
        return torch.cat([torch.stack(columns, dim=1), super().pictures(batch)[:, 1:]], dim=1)

    def picture_headings(self) -> list[str]:
        original, *attention = super().picture_headings()
        return [original, "visible patches", "reconstruction", *attention]

    def _initialize(self) -> None:
        """Initialize all linear layers with Xavier's uniform distribution (appendix A.1 of the paper).

        With the encoder's usual standard deviation of 0.02, embeddings of small patches (48 values) are tiny compared
        with the positions added to them, and the model hardly learns.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                is_qkv = name.endswith(("q_proj", "k_proj", "v_proj"))
                nn.init.xavier_uniform_(module.weight, gain=QKV_GAIN if is_qkv else 1.0)
