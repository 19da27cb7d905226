"""Any Hugging Face image-classification folder becomes a classifier of the user's classes; and is saved as one."""

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

from pretrain.data.transforms.decode import ImageArray
from pretrain.errors import UserError

transformers.utils.logging.set_verbosity_error()  # what its load report would say is checked below
transformers.utils.logging.disable_progress_bar()
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports deepspeed, which would look for one and warn


class ModelError(UserError):
    """A folder that cannot be fine-tuned or used; the message says why."""


@dataclass(frozen=True)
class Preprocessor:
    """The folder's own image processor. As a view it runs in the loader's workers."""

    processor: Any

    def __call__(self, image: ImageArray, random: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"image": self.processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]}

    @property
    def image_size(self) -> int:
        """ImageArray of the square that the model sees."""
        size = self.processor.crop_size if getattr(self.processor, "do_center_crop", False) else self.processor.size
        return int(size["height"] if size["height"] else size["shortest_edge"])

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel, of pixels in [0, 1]."""
        red, green, blue = self.processor.image_mean if self.processor.do_normalize else (0.0, 0.0, 0.0)
        return red, green, blue

    @property
    def std(self) -> tuple[float, float, float]:
        """Deviation of each channel, of pixels in [0, 1]."""
        red, green, blue = self.processor.image_std if self.processor.do_normalize else (1.0, 1.0, 1.0)
        return red, green, blue


def load_preprocessor(folder: Path) -> Preprocessor:
    """Load a folder's image processor, with Pillow as its backend: the same pixels on every machine."""
    _check_folder(folder)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no usable preprocessor_config.json: {_first_line(error)}") from None
    return Preprocessor(processor)


def load_classifier(folder: Path) -> nn.Module:
    """Load a fine-tuned folder, head and all.

    Raises:
        ModelError: no such folder, or it has no trained head.
    """
    _check_folder(folder)
    model, report = _load(folder)
    if report["missing_keys"]:  # transformers would make up a head, and only warn
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ModelError(f"{folder}: holds no trained classifier ({missing} missing); fine-tune it first")
    classifier: nn.Module = model
    return classifier


def new_classifier(folder: Path, class_names: list[str], *, from_scratch: bool, freeze_backbone: bool) -> nn.Module:
    """Load a folder's backbone under a new head.

    Args:
        folder: a Hugging Face folder of any architecture that has an image-classification class.
        class_names: of the new head.
        from_scratch: take the architecture alone, with new weights everywhere.
        freeze_backbone: leave nothing but the head to train.

    Raises:
        ModelError: no such folder, or its backbone would not be loaded whole.
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
        raise ModelError(f"{folder}: {_first_line(error)}") from None
    head = _head(config)
    model: nn.Module = fresh
    if not from_scratch:
        model, report = _load(folder, **labels, ignore_mismatched_sizes=True)
        # transformers would fill what it misses or what does not fit with random numbers, and only warn.
        mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
        lost = sorted(name for name in set(report["missing_keys"]) | mismatched if not name.startswith(head))
        if lost:
            raise ModelError(
                f"{folder}: {len(lost)} of the backbone's tensors are missing or of another shape, "
                f"the first is {lost[0]}; the folder's config.json and its weights don't belong together"
            )
        with torch.no_grad():
            new_head = {name: value for name, value in fresh.state_dict().items() if name.startswith(head)}
            model.load_state_dict(new_head, strict=False)
    if freeze_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(head))
    return model


def _head(config: Any) -> tuple[str, ...]:
    """Return what the names of the head's tensors begin with: the layers whose shape the number of classes decides.

    The names of a backbone follow no rule: transformers' own `base_model_prefix` stands before none of SigLIP's.
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


def save_folder(model: Any, preprocessor: Preprocessor, card: str, out: Path) -> None:
    """Write a Hugging Face folder aside, then put it in place of what was there."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.copymode(partial / "config.json", partial / "model.safetensors")  # safetensors writes for the owner alone
    preprocessor.processor.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
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
        raise ModelError(f"{folder}: {_first_line(error)}") from None
    return loaded


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no Hugging Face folder here (config.json is missing); `vitrail export` writes one")
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: config.json cannot be read: {_first_line(error)}") from None
    if model_type == "vit_mae":
        raise ModelError(f"{folder}: a masked autoencoder, no classifier; export the run again, without --as")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
