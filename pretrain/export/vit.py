"""The encoder as transformers' `vit`, under a linear classifier where the run has trained one."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from pretrain.config import ModelConfig, PretrainConfig
from pretrain.export.proof import LOADING, Proof, ProofError, pixels_in_evaluation, proof_images
from pretrain.model.vit import ViT

HEAD = {"classifier.weight", "classifier.bias"}
# Ours, and transformers' in memory; what is not named here has the same name in both.
NAMES = (
    ("patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("cls_token", "embeddings.cls_token"),
    ("position_embedding", "embeddings.position_embeddings"),
    ("norm.", "layernorm."),
)
LAYER_NAMES = ((".norm_before.", ".layernorm_before."), (".norm_after.", ".layernorm_after."))

CLASSIFIER = """As a classifier of {num_classes} classes:

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{folder}")
print(classify("image.jpg"))
```

As an encoder (`add_pooling_layer=False`, because transformers' ViT would add a pooler that was never trained):
"""
ENCODER = """```python
from transformers import AutoModel

encoder = AutoModel.from_pretrained("{folder}", add_pooling_layer=False)
```"""


class Vit:
    """A run's encoder, and its classifier if it has one: native, and as a folder of model type `vit`.

    Args:
        config: of the run.
        weights: of a checkpoint, by their names in the objective.
        class_names: of the training data.
    """

    def __init__(self, config: PretrainConfig, weights: dict[str, Tensor], class_names: list[str]) -> None:
        self.config = config
        self.encoder = native_encoder(config.model, weights)
        self.head = [weights[name] for name in sorted(HEAD, reverse=True)] if weights.keys() >= HEAD else None
        self.class_names = class_names if self.head else []

    @property
    def usage(self) -> str:
        """What the card says of its use."""
        return (CLASSIFIER if self.head else "As an encoder:\n") + "\n" + ENCODER

    def features(self, pixels: Tensor) -> Tensor:
        """Return the tokens, [B, T, D]."""
        tokens: Tensor = self.encoder(pixels)
        return tokens

    def logits(self, pixels: Tensor) -> Tensor:
        """Return [B, classes]."""
        assert self.head is not None
        return F.linear(self.features(pixels)[:, 0], *self.head)

    def save(self, folder: Path) -> None:
        """Write the folder's model."""
        hf_config = transformers.ViTConfig(**encoder_config(self.config.model))
        state = to_hugging_face(fold_layer_scale(self.encoder.state_dict()), self.config.model)
        if self.head:
            hf_config.id2label = dict(enumerate(self.class_names))
            hf_config.label2id = {name: label for label, name in enumerate(self.class_names)}
            hf_config.problem_type = "single_label_classification"
            model: Any = transformers.ViTForImageClassification(hf_config)
            state = {f"vit.{name}": weight for name, weight in state.items()}
            state |= dict(zip(sorted(HEAD, reverse=True), self.head, strict=True))
        else:
            model = transformers.ViTModel(hf_config, add_pooling_layer=False)
        model.load_state_dict(state, strict=True)
        model.save_pretrained(folder)

    @torch.no_grad()
    def prove(self, folder: Path) -> Proof:
        """Load a folder as a user would and compare it with the native model, in fp32 on the CPU.

        Raises:
            ProofError: a tensor is missing or left over, a class name differs, or a number is off.
        """
        proof = Proof(folder)
        classifier = None
        if self.head:
            classifier, report = transformers.AutoModelForImageClassification.from_pretrained(folder, **LOADING)
            proof.expect_strict(report)
            named = [classifier.config.id2label[label] for label in range(len(self.class_names))]
            if named != self.class_names:
                raise ProofError(f"{folder}: the class names are {named}, trained were {self.class_names}")
        # AutoModel is the encoder without a head, and transformers' ViT adds an untrained pooler unless told not to.
        encoder, report = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, **LOADING)
        proof.expect_strict(report, unexpected=HEAD if self.head else set())
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        for image in proof_images():
            seen = processor(image, return_tensors="pt")["pixel_values"]
            pixels = pixels_in_evaluation(self.config, image)
            if classifier is not None:
                proof.compare("logits", classifier(seen).logits, self.logits(pixels))
            proof.compare("features", encoder(seen).last_hidden_state, self.features(pixels))
            proof.compare("pixels", seen, pixels)
        return proof


def native_encoder(config: ModelConfig, weights: dict[str, Tensor]) -> ViT:
    """Build the encoder as it was trained, from a checkpoint's weights alone."""
    encoder = ViT(config).eval()
    prefix = "encoder."
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    encoder.load_state_dict(own, strict=True)
    return encoder


def encoder_config(config: ModelConfig) -> dict[str, Any]:
    """Return what transformers' configs call an encoder's sizes."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.mlp_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "qkv_bias": True,
    }


def fold_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply the factors of LayerScale, which `vit` has no place for, into the layers before them."""
    folded = dict(weights)
    for name in weights:
        for scale, layer in ((".attention_scale.weight", ".attention.o_proj"), (".mlp_scale.weight", ".mlp.fc2")):
            if name.endswith(scale):
                factor, before = folded.pop(name), name.removesuffix(scale) + layer
                folded[f"{before}.weight"] = weights[f"{before}.weight"] * factor[:, None]
                folded[f"{before}.bias"] = weights[f"{before}.bias"] * factor
    return folded


def to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename an encoder's weights to those of transformers' ViTModel in memory; nothing is dropped."""
    renamed = {}
    for name, weight in weights.items():
        theirs = next((theirs + name.removeprefix(ours) for ours, theirs in NAMES if name.startswith(ours)), name)
        for ours, other in LAYER_NAMES:
            theirs = theirs.replace(ours, other)
        if name == "patch_embedding.weight":  # ours is a matrix over a patch, theirs a convolution patch by patch
            weight = weight.reshape(-1, config.num_channels, config.patch_size, config.patch_size)  # noqa: PLW2901
        renamed[theirs] = weight.to(torch.float32)
    return renamed
