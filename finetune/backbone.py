"""Load the backbone of any Hugging Face image-classification folder under a new head, and save such folders."""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from pretrain.data.transforms.decode import ImageArray
from pretrain.errors import MachineError, UserError, first_line
from pretrain.files import atomic_folder

transformers.utils.logging.set_verbosity_error()  # the functions below check its load report and raise errors
transformers.utils.logging.disable_progress_bar()
if not torch.cuda.is_available():
    # Saving a model imports deepspeed, which otherwise looks for an accelerator and prints a warning.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

PROCESSOR_FILE = "preprocessor_config.json"

# Imported once by the server of the data workers, instead of by each worker that unpickles a `Preprocessor`.
WORKER_MODULES = ("finetune.backbone", "transformers.image_processing_backends")


class ModelError(UserError):
    """A model folder that cannot be fine-tuned or used."""


@dataclass(frozen=True)
class Preprocessor:
    """The image processor of a Hugging Face folder, usable as a view: it runs in the data workers.

    Attributes:
        processor: Hugging Face image processor.
    """

    processor: Any

    def __call__(self, image: ImageArray, random: np.random.Generator) -> dict[str, torch.Tensor]:
        """Preprocess an image.

        Args:
            image: Decoded image, uint8 [H, W, 3].
            random: Unused; training views need it.

        Returns:
            "image", float [3, H, W] with the size and the normalization of the folder.
        """
        return {"image": self.processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]}

    def batch(self, images: Sequence[ImageArray]) -> torch.Tensor:
        """Preprocess decoded images of any sizes; return float [B, 3, H, W]."""
        unused = np.random.default_rng(0)
        return torch.stack([self(image, unused)["image"] for image in images])

    @property
    def image_size(self) -> int:
        """Height and width of the model's input in pixels."""
        size = self.processor.crop_size if getattr(self.processor, "do_center_crop", False) else self.processor.size
        return int(size["height"] if size["height"] else size["shortest_edge"])

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel, for pixels in [0, 1]."""
        red, green, blue = self.processor.image_mean if self.processor.do_normalize else (0.0, 0.0, 0.0)
        return red, green, blue

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel, for pixels in [0, 1]."""
        red, green, blue = self.processor.image_std if self.processor.do_normalize else (1.0, 1.0, 1.0)
        return red, green, blue


def load_preprocessor(folder: Path) -> Preprocessor:
    """Load a folder's image processor. It uses Pillow, which returns the same pixels on every machine.

    Raises:
        ModelError: If the folder has no usable preprocessor_config.json.
    """
    _check_folder(folder)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: no usable preprocessor_config.json: {first_line(error)}; export the run again"
        ) from None
    return Preprocessor(processor)


def load_classifier(folder: Path) -> nn.Module:
    """Load a fine-tuned folder with its classification head.

    Raises:
        ModelError: If the folder is not a Hugging Face folder, or has no trained head.
    """
    _check_folder(folder)
    model, report = _load(folder)
    if report["missing_keys"]:  # transformers would fill them with random numbers and only print a warning
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ModelError(
            f"{folder}: this folder has no trained classification head (missing: {missing}); fine-tune it first"
        )
    classifier: nn.Module = model
    return classifier


def new_classifier(folder: Path, class_names: list[str], *, from_scratch: bool, freeze_backbone: bool) -> nn.Module:
    """Load a folder's backbone under a new classification head.

    Args:
        folder: Hugging Face folder of any architecture that transformers offers an image-classification class for.
        class_names: Class names of the new head.
        from_scratch: Whether to use only the architecture, with new weights everywhere.
        freeze_backbone: Whether to train only the head.

    Raises:
        ModelError: If the folder is not a Hugging Face folder, or a tensor of its backbone is missing or does not fit.
    """
    _check_folder(folder)
    labels = {
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
        "problem_type": "single_label_classification",
    }
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **labels)
        fresh = transformers.AutoModelForImageClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: transformers cannot load it: {first_line(error)}; export or download it again"
        ) from None
    head = _head_prefixes(config)
    model: nn.Module = fresh
    if not from_scratch:
        model, report = _load(folder, **labels, ignore_mismatched_sizes=True)
        # transformers would fill missing and mismatched tensors with random numbers and only print a warning.
        mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
        lost = sorted(name for name in set(report["missing_keys"]) | mismatched if not name.startswith(head))
        if lost:
            others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise ModelError(
                f"{folder}: the weights do not match config.json; missing or of another shape: {lost[0]}{others}; "
                "export or download the folder again"
            )
        with torch.no_grad():
            new_head = {name: value for name, value in fresh.state_dict().items() if name.startswith(head)}
            model.load_state_dict(new_head, strict=False)
    if freeze_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(head))
    return model


def save_folder(model: Any, preprocessor: Preprocessor, card: str, out: Path) -> None:
    """Write a Hugging Face folder; an existing one is replaced only after the new one is complete.

    Args:
        model: Hugging Face classifier.
        preprocessor: Preprocessing of the images.
        card: Text of the model card, README.md.
        out: Folder to write.

    Raises:
        MachineError: If the folder cannot be written, for example because the disk is full.
    """
    try:
        with atomic_folder(out, overwrite=True) as folder:
            model.save_pretrained(folder)
            # safetensors creates files that only their owner can read.
            shutil.copymode(folder / "config.json", folder / "model.safetensors")
            preprocessor.processor.save_pretrained(folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"{out}: the model cannot be saved: {first_line(error)}; free disk space or choose another run_dir"
        ) from None


def _head_prefixes(config: Any) -> tuple[str, ...]:
    """Return the prefixes of the names of the head's tensors: those of the layers whose shape depends on the classes.

    The names of a backbone's tensors follow no rule: none of SigLIP's, for example, starts with transformers' own
    `base_model_prefix`.
    """
    other = copy.deepcopy(config)
    other.num_labels = config.num_labels + 1
    with torch.device("meta"):
        shapes = [
            {
                name: value.shape
                for name, value in transformers.AutoModelForImageClassification.from_config(c).state_dict().items()
            }
            for c in (config, other)
        ]
    return tuple({f"{name.rpartition('.')[0]}." for name in shapes[0] if shapes[0][name] != shapes[1][name]})


def _load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model in float32, and transformers' report about missing and mismatched tensors."""
    try:
        loaded: tuple[Any, dict[str, Any]] = transformers.AutoModelForImageClassification.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: transformers cannot load it: {first_line(error)}; export or download it again"
        ) from None
    return loaded


def _read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file.

    Raises:
        ModelError: If the file cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {first_line(error)}; export or download the folder again") from None
    return content if isinstance(content, dict) else {}


def _check_folder(folder: Path) -> None:
    """Check that this is a Hugging Face folder that a classifier can be built from.

    Raises:
        ModelError: If it is not.
    """
    config_file = folder / "config.json"
    if not config_file.exists():
        raise ModelError(
            f"{folder}: not a Hugging Face folder (config.json is missing); create one with `vitrail export`"
        )
    content = _read_json(config_file)
    model_type = content.get("model_type")
    for file, settings in ((config_file, content), (folder / PROCESSOR_FILE, _read_json(folder / PROCESSOR_FILE))):
        if "auto_map" in settings:
            raise ModelError(
                f"{file}: this folder needs code of its own (auto_map), which is never run; "
                "use a model of an architecture that transformers has"
            )
    if model_type == "vit_mae":
        raise ModelError(
            f"{folder}: a masked autoencoder cannot be fine-tuned as a classifier; "
            "export the run again without --as to get its encoder"
        )
