"""Export of the encoder as transformers' `vit`, with a linear classifier if the run has trained one."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from pretrain.card import USAGE_OF_CLASSIFIER
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.export.proof import LOADING, Proof, ProofError, evaluation_pixels, proof_images
from pretrain.model.hub_names import (
    CLASSIFIER,
    ENCODER_PREFIX,
    encoder_to_hub,
    fold_layer_scale,
    hub_encoder_config,
)
from pretrain.model.vit import ViT

USAGE_OF_ENCODER = """As an encoder, without the pooler that transformers' ViT would add, which was never trained:

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
encoder = AutoModel.from_pretrained("path/to/this/folder", add_pooling_layer=False)
pixels = processor(Image.open("image.jpg"), return_tensors="pt")
features = encoder(**pixels).last_hidden_state[:, 0]  # the CLS token
```"""


class Vit:
    """A run's encoder, and its classifier if it has one: as our model, and as a folder of model type `vit`.

    Args:
        config: Configuration of the run.
        weights: Weights of a checkpoint, by their names in the objective.
        class_names: Class names of the training data.
    """

    def __init__(self, config: PretrainConfig, weights: dict[str, Tensor], class_names: list[str]) -> None:
        self.config = config
        self.encoder = load_encoder(config.model, weights)
        self.head = [weights[name] for name in CLASSIFIER] if weights.keys() >= set(CLASSIFIER) else None
        self.class_names = class_names if self.head else []

    @property
    def usage(self) -> str:
        """Section of the model card that shows how to load the folder."""
        return f"As a classifier:\n\n{USAGE_OF_CLASSIFIER}\n\n{USAGE_OF_ENCODER}" if self.head else USAGE_OF_ENCODER

    def features(self, pixels: Tensor) -> Tensor:
        """Return the encoder's tokens [B, T, D] for normalized pixels [B, C, H, W]."""
        tokens: Tensor = self.encoder(pixels)
        return tokens

    def logits(self, pixels: Tensor) -> Tensor:
        """Return the classifier's logits [B, classes] for normalized pixels [B, C, H, W]."""
        assert self.head is not None
        return F.linear(self.features(pixels)[:, 0], *self.head)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors to `folder`."""
        hf_config = transformers.ViTConfig(**hub_encoder_config(self.config.model))
        prefix = ENCODER_PREFIX if self.head else ""
        state = encoder_to_hub(fold_layer_scale(self.encoder.state_dict()), self.config.model, prefix)
        if self.head:
            hf_config.id2label = dict(enumerate(self.class_names))
            hf_config.label2id = {name: label for label, name in enumerate(self.class_names)}
            hf_config.problem_type = "single_label_classification"
            model: Any = transformers.ViTForImageClassification(hf_config)
            state |= dict(zip(CLASSIFIER, self.head, strict=True))
        else:
            model = transformers.ViTModel(hf_config, add_pooling_layer=False)
        model.load_state_dict(state, strict=True)
        model.save_pretrained(folder)

    @torch.no_grad()
    def prove(self, folder: Path) -> Proof:
        """Load a folder as a user would and compare its outputs with our model's, in fp32 on the CPU.

        Raises:
            ProofError: If a tensor is missing or unexpected, or if class names, pixels or outputs differ.
        """
        proof = Proof(folder)
        classifier = None
        if self.head:
            classifier, report = transformers.AutoModelForImageClassification.from_pretrained(folder, **LOADING)
            proof.expect_strict(report)
            found = [classifier.config.id2label[label] for label in range(len(self.class_names))]
            if found != self.class_names:
                sentence = f"has the classes {found}, but the run was trained on {self.class_names}; export it again"
                raise ProofError(f"{folder}: {sentence}")
        # AutoModel loads the encoder without its head. Without add_pooling_layer=False it adds an untrained pooler.
        encoder, report = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, **LOADING)
        proof.expect_strict(report, unexpected=CLASSIFIER if self.head else ())
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        for image in proof_images():
            processed = processor(image, return_tensors="pt")["pixel_values"]
            pixels = evaluation_pixels(self.config, image)
            if classifier is not None:
                proof.compare("logits", classifier(processed).logits, self.logits(pixels))
            proof.compare("features", encoder(processed).last_hidden_state, self.features(pixels))
            proof.compare("pixels", processed, pixels)
        return proof


def load_encoder(config: ModelConfig, weights: dict[str, Tensor]) -> ViT:
    """Build the encoder in evaluation mode with the weights of a checkpoint, by their names in the objective."""
    encoder = ViT(config).eval()
    prefix = "encoder."
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    encoder.load_state_dict(own, strict=True)
    return encoder
