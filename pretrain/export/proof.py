"""The proof of an exported folder: it loads offline and strictly, and gives the native model's numbers."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

from pretrain import UserError
from pretrain.config import ModelConfig, PreprocessingConfig
from pretrain.data.augment import EvalView
from pretrain.data.colour import normalize
from pretrain.model.vit import ViT

transformers.utils.logging.set_verbosity_error()  # its load report would warn of the head that AutoModel leaves out
transformers.utils.logging.disable_progress_bar()
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports deepspeed, which would look for one and warn

TOLERANCE = 1e-5
IMAGE_SIZES = ((48, 48), (64, 40), (37, 91), (300, 200), (20, 30))  # height, width
HEAD = {"classifier.weight", "classifier.bias"}


class ProofError(UserError):
    """An exported folder that is not the model it was made from."""


@dataclass(frozen=True)
class Proof:
    """The largest absolute differences that were found, each over every proof image."""

    logits: float
    features: float
    pixels: float


class NativeClassifier:
    """The model as it was trained, built from a checkpoint's weights alone."""

    def __init__(self, model: ModelConfig, preprocessing: PreprocessingConfig, weights: dict[str, Tensor]) -> None:
        self.preprocessing = preprocessing
        self.view = EvalView(model.image_size, preprocessing.resize_ratio)
        self.encoder = ViT(model).eval()
        prefix = "encoder."
        encoder = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        self.encoder.load_state_dict(encoder, strict=True)
        self.head = weights["classifier.weight"], weights["classifier.bias"]

    def pixels(self, image: Image.Image) -> Tensor:
        """Return [1, C, H, W], seen as in evaluation."""
        view = self.view(np.array(image), np.random.default_rng(0))["image"]
        pixels = torch.from_numpy(view)[None].float() / 255
        return normalize(pixels, self.preprocessing.image_mean, self.preprocessing.image_std)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the tokens [B, T, D]."""
        tokens: Tensor = self.encoder(pixels)
        return tokens

    def logits(self, pixels: Tensor) -> Tensor:
        """Return [B, classes]."""
        return F.linear(self.features(pixels)[:, 0], *self.head)


@torch.no_grad()
def prove(folder: Path, native: NativeClassifier, class_names: list[str]) -> Proof:
    """Load `folder` as a user would and compare it with the native model, in fp32 on the CPU.

    Raises:
        ProofError: a tensor is missing or left over, a class name differs, or a number is off by more than 1e-5
            (of the largest, where that is above 1).
    """
    classifier, report = transformers.AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype=torch.float32
    )
    _expect_strict(report, missing=set(), unexpected=set())
    # AutoModel is the encoder without a head, and transformers' ViT adds an untrained pooler unless told not to.
    encoder, report = transformers.AutoModel.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype=torch.float32, add_pooling_layer=False
    )
    _expect_strict(report, missing=set(), unexpected=HEAD)
    named = [classifier.config.id2label[label] for label in range(len(class_names))]
    if named != class_names:
        raise ProofError(f"{folder}: the class names are {named}, trained were {class_names}")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")

    worst = {"logits": 0.0, "features": 0.0, "pixels": 0.0}
    for image in proof_images():
        seen = processor(image, return_tensors="pt")["pixel_values"]
        pixels = native.pixels(image)
        pairs = {
            "logits": (classifier(seen).logits, native.logits(pixels)),
            "features": (encoder(seen).last_hidden_state, native.features(pixels)),
            "pixels": (seen, pixels),
        }
        for name, (exported, trained) in pairs.items():
            difference, largest = float((exported - trained).abs().max()), float(trained.abs().max())
            if not difference <= TOLERANCE * max(1.0, largest):  # also when it is not a number
                raise ProofError(f"{folder}: its {name} differ from the trained model's by {difference:.1e}")
            worst[name] = max(worst[name], difference)
    return Proof(**worst)


def proof_images() -> list[Image.Image]:
    """Return images of several shapes, with smooth and with sharp detail."""
    random = np.random.default_rng(0)
    images = []
    for height, width in IMAGE_SIZES:
        noise = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        smooth = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        images += [noise, smooth.resize((width, height), Image.Resampling.BICUBIC)]
    return images


def _expect_strict(report: dict[str, set[str]], missing: set[str], unexpected: set[str]) -> None:
    found = set(report["missing_keys"]), set(report["unexpected_keys"]), set(report["mismatched_keys"])
    if found != (missing, unexpected, set()):
        raise ProofError(f"the folder does not load strictly: missing, unexpected, mismatched = {found}")
