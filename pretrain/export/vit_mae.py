"""Export of a masked autoencoder, including its decoder, as transformers' `vit_mae`."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config import MAEConfig, ModelConfig, PretrainConfig
from pretrain.errors import UserError
from pretrain.export.proof import LOADING, Proof, ProofError, evaluation_pixels, proof_images
from pretrain.export.vit import load_encoder
from pretrain.model.hub_names import (
    ENCODER_PREFIX,
    decoder_name_on_hub,
    decoder_to_hub,
    encoder_to_hub,
    fold_layer_scale,
    hub_encoder_config,
    pixel_order,
)
from pretrain.model.mae_decoder import MAEDecoder

PREFIX = "decoder."


class VitMae:
    """A run's masked autoencoder: as our model, and as a folder of model type `vit_mae`.

    Args:
        config: Configuration of the run.
        weights: Weights of a checkpoint, by their names in the objective.
        class_names: Class names of the training data; unused, because a masked autoencoder has no classifier.

    Raises:
        UserError: If the run has not trained a decoder.
    """

    usage = """As a masked autoencoder, to reconstruct images or to continue pretraining:

```python
from PIL import Image
from transformers import AutoImageProcessor, ViTMAEForPreTraining

processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
autoencoder = ViTMAEForPreTraining.from_pretrained("path/to/this/folder")
pixels = processor(Image.open("image.jpg"), return_tensors="pt")
reconstructed = autoencoder.unpatchify(autoencoder(**pixels).logits)
```"""

    def __init__(self, config: PretrainConfig, weights: dict[str, Tensor], class_names: list[str]) -> None:
        if "vit_mae" not in config.objective.export_types:
            given = f"objective.name={config.objective.name}"
            raise UserError(f"{config.run_dir}: {given} has no decoder to export; remove --as vit_mae")
        self.config = config
        self.objective = cast(MAEConfig, config.objective)
        self.encoder = load_encoder(config.model, weights)
        self.decoder = MAEDecoder(self.objective.decoder_config(config.model), config.model.hidden_size).eval()
        own = {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name.startswith(PREFIX)}
        self.decoder.load_state_dict(own, strict=True)

    def predict(self, pixels: Tensor, patch_order: Tensor) -> Tensor:
        """Predict the hidden patches [B, N - V, P * P * C], with the values of a patch in transformers' order."""
        visible = patch_order[:, : self.objective.num_visible_patches(self.config.model)]
        predicted = self.decoder(self.encoder(pixels, visible), patch_order)
        reordered: Tensor = predicted[..., pixel_order(self.config.model)]
        return reordered

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors to `folder`, with tensor names that transformers 4 and 5 load."""
        model = transformers.ViTMAEForPreTraining(hub_mae_config(self.config.model, self.objective))
        state = encoder_to_hub(fold_layer_scale(self.encoder.state_dict()), self.config.model, ENCODER_PREFIX)
        state |= decoder_to_hub(self.decoder.state_dict(), self.config.model)
        model.load_state_dict(state, strict=True)
        model.save_pretrained(folder)
        (file,) = folder.glob("*.safetensors")
        tensors = {decoder_name_on_hub(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    @torch.no_grad()
    def prove(self, folder: Path) -> Proof:
        """Load a folder as a user would and compare its reconstructed patches with our model's.

        Raises:
            ProofError: If a tensor is missing or unexpected, or if settings, pixels or outputs differ.
        """
        proof = Proof(folder)
        model, report = transformers.ViTMAEForPreTraining.from_pretrained(folder, **LOADING)
        proof.expect_strict(report)
        found = model.config.mask_ratio, model.config.norm_pix_loss
        trained = self.objective.mask_ratio, self.objective.normalize_targets
        if found != trained:
            sentence = f"has mask_ratio and norm_pix_loss {found}, but the run used {trained}; export it again"
            raise ProofError(f"{folder}: {sentence}")
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        random, num_patches = np.random.default_rng(0), self.config.model.num_patches
        for image in proof_images():
            processed = processor(image, return_tensors="pt")["pixel_values"]
            pixels = evaluation_pixels(self.config, image)
            patch_order = torch.from_numpy(random.permutation(num_patches))[None]
            reconstructed = model(processed, noise=patch_order.argsort(dim=1).float())
            hidden = patch_order[0, self.objective.num_visible_patches(self.config.model) :]
            proof.compare("reconstructed patches", reconstructed.logits[:, hidden], self.predict(pixels, patch_order))
            proof.compare("pixels", processed, pixels)
        return proof


def hub_mae_config(model: ModelConfig, objective: MAEConfig) -> transformers.ViTMAEConfig:
    """Return the configuration of a masked autoencoder for transformers."""
    return transformers.ViTMAEConfig(
        **hub_encoder_config(model),
        mask_ratio=objective.mask_ratio,
        norm_pix_loss=objective.normalize_targets,
        decoder_hidden_size=objective.decoder_hidden_size,
        decoder_num_hidden_layers=objective.decoder_num_hidden_layers,
        decoder_num_attention_heads=objective.decoder_num_attention_heads,
        decoder_intermediate_size=objective.decoder_intermediate_size,
    )
