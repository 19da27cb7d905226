"""A masked autoencoder as transformers' `vit_mae`, its decoder included."""

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config import MAEConfig, ModelConfig, PretrainConfig
from pretrain.errors import UserError
from pretrain.export.proof import LOADING, Proof, ProofError, pixels_in_evaluation, proof_images
from pretrain.export.vit import LAYER_NAMES, encoder_config, fold_layer_scale, native_encoder, to_hugging_face
from pretrain.model.mae_decoder import MAEDecoder

PREFIX = "decoder."
NAMES = {
    "embedding.weight": "decoder_embed.weight",
    "embedding.bias": "decoder_embed.bias",
    "position_embedding": "decoder_pos_embed",
    "norm.weight": "decoder_norm.weight",
    "norm.bias": "decoder_norm.bias",
    "prediction.weight": "decoder_pred.weight",
    "prediction.bias": "decoder_pred.bias",
}
# transformers 5.23 saves the first; 4.57, and the folders on the hub, have the second.
WRONG_ON_DISK, RIGHT_ON_DISK = "decoder.decoder_encoder.layer.", "decoder.decoder_layers."


class VitMae:
    """A run's masked autoencoder: native, and as a folder of model type `vit_mae`.

    Args:
        config: of the run.
        weights: of a checkpoint, by their names in the objective.
        class_names: of the training data; a masked autoencoder has no use for them.

    Raises:
        UserError: the run has trained no decoder.
    """

    usage = """As a masked autoencoder, to rebuild images or to go on pretraining:

```python
from transformers import ViTMAEForPreTraining

autoencoder = ViTMAEForPreTraining.from_pretrained("{folder}")
```"""

    def __init__(self, config: PretrainConfig, weights: dict[str, Tensor], class_names: list[str]) -> None:
        if not isinstance(config.objective, MAEConfig):
            raise UserError(f"{config.run_dir}: objective.name={config.objective.name} has no decoder; leave out --as")
        self.config = config
        self.objective = config.objective
        self.encoder = native_encoder(config.model, weights)
        self.decoder = MAEDecoder(config.objective.decoder_config(config.model), config.model.hidden_size).eval()
        own = {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name.startswith(PREFIX)}
        self.decoder.load_state_dict(own, strict=True)

    def predict(self, pixels: Tensor, patch_order: Tensor) -> Tensor:
        """Rebuild the hidden patches, [B, N - V, P * P * C]: the last dimension in transformers' order."""
        visible = patch_order[:, : self.objective.num_visible_patches(self.config.model)]
        predicted = self.decoder(self.encoder(pixels, visible), patch_order)
        rebuilt: Tensor = predicted[..., pixel_order(self.config.model)]
        return rebuilt

    def save(self, folder: Path) -> None:
        """Write the folder's model, under the names on disk that every version reads."""
        model = transformers.ViTMAEForPreTraining(hugging_face_config(self.config.model, self.objective))
        encoder = to_hugging_face(fold_layer_scale(self.encoder.state_dict()), self.config.model)
        state = {f"vit.{name}": weight for name, weight in encoder.items()}
        state |= decoder_to_hugging_face(self.decoder.state_dict(), self.config.model)
        model.load_state_dict(state, strict=True)
        model.save_pretrained(folder)
        (file,) = folder.glob("*.safetensors")
        tensors = {name.replace(WRONG_ON_DISK, RIGHT_ON_DISK): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    @torch.no_grad()
    def prove(self, folder: Path) -> Proof:
        """Load a folder as a user would, and compare features and rebuilt pixels with the native model's.

        Raises:
            ProofError: a tensor is missing or left over, or a number is off.
        """
        proof = Proof(folder)
        model, report = transformers.ViTMAEForPreTraining.from_pretrained(folder, **LOADING)
        proof.expect_strict(report)
        found = model.config.mask_ratio, model.config.norm_pix_loss
        trained = self.objective.mask_ratio, self.objective.normalize_targets
        if found != trained:
            raise ProofError(f"{folder}: its mask_ratio and norm_pix_loss are {found}, trained were {trained}")
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        random, num_patches = np.random.default_rng(0), self.config.model.num_patches
        for image in proof_images():
            seen = processor(image, return_tensors="pt")["pixel_values"]
            pixels = pixels_in_evaluation(self.config, image)
            patch_order = torch.from_numpy(random.permutation(num_patches))[None]
            rebuilt = model(seen, noise=patch_order.argsort(dim=1).float())
            hidden = patch_order[0, self.objective.num_visible_patches(self.config.model) :]
            proof.compare("rebuilt patches", rebuilt.logits[:, hidden], self.predict(pixels, patch_order))
            proof.compare("pixels", seen, pixels)
        return proof


def hugging_face_config(model: ModelConfig, objective: MAEConfig) -> transformers.ViTMAEConfig:
    """Return transformers' config of a masked autoencoder."""
    return transformers.ViTMAEConfig(
        **encoder_config(model),
        mask_ratio=objective.mask_ratio,
        norm_pix_loss=objective.normalize_targets,
        decoder_hidden_size=objective.decoder_hidden_size,
        decoder_num_hidden_layers=objective.decoder_num_hidden_layers,
        decoder_num_attention_heads=objective.decoder_num_attention_heads,
        decoder_intermediate_size=objective.decoder_intermediate_size,
    )


def decoder_to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename a decoder's weights to those of transformers' ViTMAEForPreTraining in memory; nothing is dropped."""
    renamed = {}
    for name, weight in weights.items():
        theirs = NAMES.get(name, name.replace("layers.", "decoder_layers.", 1))
        for ours, other in LAYER_NAMES:
            theirs = theirs.replace(ours, other)
        if name.startswith("prediction."):
            weight = weight[pixel_order(config)]  # noqa: PLW2901
        renamed[f"{PREFIX}{theirs}"] = weight.to(torch.float32)
    return renamed


def pixel_order(config: ModelConfig) -> Tensor:
    """Return where transformers' values of a patch, pixel by pixel, stand in ours, channel by channel: [P * P * C]."""
    return torch.arange(config.num_channels * config.patch_size**2).reshape(config.num_channels, -1).T.flatten()
