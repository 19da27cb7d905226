"""The proof of an exported folder: it loads offline and strictly, and gives the native model's numbers."""

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

transformers.utils.logging.set_verbosity_error()  # its load report would warn of the head that AutoModel leaves out
transformers.utils.logging.disable_progress_bar()
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports deepspeed, which would look for one and warn

TOLERANCE = 1e-5
IMAGE_SIZES = ((48, 48), (64, 40), (37, 91), (300, 200), (20, 30))  # height, width
# As a user would load a folder, but offline and in fp32.
LOADING = {"output_loading_info": True, "local_files_only": True, "dtype": torch.float32}


class ProofError(UserError):
    """An exported folder that is not the model it was made from."""


@dataclass
class Proof:
    """The largest absolute differences that were found, each over every proof image."""

    folder: Path
    differences: dict[str, float] = field(default_factory=dict)

    def compare(self, name: str, exported: Tensor, trained: Tensor) -> None:
        """Compare what the folder gives with what the native model gives.

        Raises:
            ProofError: they are farther apart than 1e-5 (of the largest, where that is above 1).
        """
        difference, largest = float((exported - trained).abs().max()), float(trained.abs().max())
        if not difference <= TOLERANCE * max(1.0, largest):  # also when it is not a number
            raise ProofError(f"{self.folder}: its {name} differ from the trained model's by {difference:.1e}")
        self.differences[name] = max(self.differences.get(name, 0.0), difference)

    def expect_strict(self, report: dict[str, set[str]], unexpected: Collection[str] = ()) -> None:
        """Hold transformers' report of a loading to nothing missing, and nothing left over but `unexpected`.

        Raises:
            ProofError: it says otherwise.
        """
        found = set(report["missing_keys"]), set(report["unexpected_keys"]), set(report["mismatched_keys"])
        if found != (set(), set(unexpected), set()):
            raise ProofError(f"{self.folder} does not load strictly: missing, unexpected, mismatched = {found}")

    def __str__(self) -> str:
        *others, last = (f"{value:.1e} in the {name}" for name, value in self.differences.items())
        return f"{', '.join(others)} and {last}"


def pixels_in_evaluation(config: PretrainConfig, image: Image.Image) -> Tensor:
    """Return an image as the native model sees it, [1, C, H, W]."""
    view = EvalView(config.model.image_size, config.preprocessing.resize_ratio)
    pixels = torch.from_numpy(view(np.array(image), np.random.default_rng(0))["image"])
    return normalize(pixels[None].float() / 255, config.preprocessing.image_mean, config.preprocessing.image_std)


def proof_images() -> list[Image.Image]:
    """Return images of several shapes, with smooth and with sharp detail."""
    random = np.random.default_rng(0)
    images = []
    for height, width in IMAGE_SIZES:
        noise = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        smooth = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        images += [noise, smooth.resize((width, height), Image.Resampling.BICUBIC)]
    return images
