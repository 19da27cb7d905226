"""The proof of an exported folder: it loads offline and strictly, and computes what our model computes."""

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from pretrain.config import PretrainConfig
from pretrain.data.transforms.color import normalize
from pretrain.data.transforms.views import EvalView
from pretrain.errors import UserError

transformers.utils.logging.set_verbosity_error()  # otherwise it warns about the head that AutoModel does not load
transformers.utils.logging.disable_progress_bar()
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # save_pretrained imports deepspeed, which warns without a GPU

TOLERANCE = 1e-5
IMAGE_SIZES = ((48, 48), (64, 40), (37, 91), (300, 200), (20, 30))  # height, width
# Load a folder as a user would, but offline and in fp32.
LOADING = {"output_loading_info": True, "local_files_only": True, "dtype": torch.float32}


class ProofError(UserError):
    """An exported folder that differs from the model it was made from."""


@dataclass
class Proof:
    """The result of comparing an exported folder with our model.

    Attributes:
        folder: The exported folder.
        differences: Largest absolute difference over all test images, by name of the compared output.
    """

    folder: Path
    differences: dict[str, float] = field(default_factory=dict)

    @property
    def has_classifier(self) -> bool:
        """Whether the folder predicts classes."""
        return "logits" in self.differences

    def compare(self, name: str, exported: Tensor, trained: Tensor) -> None:
        """Record the largest absolute difference between an output of the folder and of our model.

        Args:
            name: Name of the output.
            exported: Output of the exported folder.
            trained: Output of our model.

        Raises:
            ProofError: If the difference exceeds 1e-5, relative to the largest value where that is above 1.
        """
        difference, largest = float((exported - trained).abs().max()), float(trained.abs().max())
        if not difference <= TOLERANCE * max(1.0, largest):  # NaN also fails
            sentence = f"{name} differ from the trained model's by {difference:.1e}"
            raise ProofError(f"{self.folder}: {sentence}; export again and report this if it happens again")
        self.differences[name] = max(self.differences.get(name, 0.0), difference)

    def expect_strict(self, report: dict[str, set[str]], unexpected: Collection[str] = ()) -> None:
        """Check that transformers has loaded every tensor.

        Args:
            report: Loading info that transformers returns.
            unexpected: Names of tensors in the folder that the loaded class does not use.

        Raises:
            ProofError: If a tensor is missing, has another shape, or is unexpected.
        """
        found = set(report["missing_keys"]), set(report["unexpected_keys"]), set(report["mismatched_keys"])
        if found != (set(), set(unexpected), set()):
            sentence = f"does not load strictly: missing, unexpected, mismatched = {found}"
            raise ProofError(f"{self.folder}: {sentence}; export it again with the installed transformers")

    def __str__(self) -> str:
        *others, last = (f"{value:.1e} in the {name}" for name, value in self.differences.items())
        return f"{', '.join(others)} and {last}" if others else last


def evaluation_pixels(config: PretrainConfig, image: Image.Image) -> Tensor:
    """Preprocess an image as validation does: normalized pixels [1, C, H, W]."""
    view = EvalView(config.model.image_size, config.preprocessing.resize_ratio)
    pixels = torch.from_numpy(view(np.array(image), np.random.default_rng(0))["image"])
    return normalize(pixels[None].float() / 255, config.preprocessing.image_mean, config.preprocessing.image_std)


def proof_images() -> list[Image.Image]:
    """Return test images of several shapes, one with noise and one smooth for each shape."""
    random = np.random.default_rng(0)
    images = []
    for height, width in IMAGE_SIZES:
        noise = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        smooth = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        images += [noise, smooth.resize((width, height), Image.Resampling.BICUBIC)]
    return images
