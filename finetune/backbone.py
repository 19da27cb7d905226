"""Load the backbone of any Hugging Face image-classification folder under a new head, and save such folders."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from finetune.folder import LOADING, ModelError, check_folder, errors_of_transformers, first_sentence
from finetune.preprocessor import Preprocessor
from pretrain.errors import MachineError, first_line
from pretrain.files import atomic_folder


def load_classifier(folder: Path) -> nn.Module:
    """Load a fine-tuned folder with its classification head.

    Raises:
        ModelError: If the folder is not a Hugging Face folder, or has no trained head.
    """
    check_folder(folder)
    model, report = _load(folder, _read_config(folder))
    if report["missing_keys"]:  # transformers would fill them with random numbers and only print a warning
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ModelError(
            f"{folder}: this folder has no trained classification head (missing: {missing}); fine-tune it first"
        )
    num_labels = model.config.num_labels
    if model.config.id2label.keys() != {*range(num_labels)}:
        raise ModelError(
            f"{folder / 'config.json'}: id2label does not number its classes from 0 to {num_labels - 1}; fix it"
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
    check_folder(folder)
    config = _read_config(
        folder,
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        label2id={name: label for label, name in enumerate(class_names)},
        problem_type="single_label_classification",
    )
    with errors_of_transformers(folder):
        fresh = _from_config(config)
        head = _head_prefixes(config)
    model: nn.Module = fresh
    if not from_scratch:
        model, report = _load(folder, config, ignore_mismatched_sizes=True)
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


@torch.no_grad()
def check_input(model: Any, preprocessor: Preprocessor) -> None:
    """Send one image through the processor and the model.

    Raises:
        ModelError: If the model cannot use the processor's images.
    """
    side = preprocessor.image_size
    pixels = preprocessor(np.full((side, side, 3), 128, np.uint8), np.random.default_rng(0))["image"]
    was_training = model.training
    model.eval()
    try:
        logits = model(pixel_values=pixels[None]).logits
    except Exception as error:  # each architecture raises its own errors
        settings = getattr(model.config, "vision_config", model.config)
        wanted = {name: getattr(settings, name, None) for name in ("image_size", "num_channels")}
        named = ", ".join(f"{name}={value}" for name, value in wanted.items() if value is not None)
        raise ModelError(
            f"{preprocessor.file}: the model cannot use the images that the processor makes, 3 channels of {side} x "
            f"{side} pixels: {first_sentence(error)}; make it agree with config.json ({named})"
        ) from None
    finally:
        model.train(was_training)
    if not logits.isfinite().all():
        raise ModelError(
            f"{preprocessor.file.parent}: the model's output for a gray image is not finite; download or export the "
            "folder again"
        )


class FeatureExtractor(nn.Module):
    """The backbone of a Hugging Face folder: it returns what the folder's classification head is given, or would be.

    That is the CLS token after the last LayerNorm for ViT and DeiT, CLS token and mean of the patches for DINOv2, and
    the mean over all positions for networks without a CLS token, such as ResNet and Swin.

    Args:
        folder: Hugging Face folder of any architecture that can be fine-tuned, with or without a trained head.
        preprocessor: Preprocessing of the folder.

    Raises:
        ModelError: If the folder has no usable backbone, or the backbone cannot use the preprocessor's images.
    """

    def __init__(self, folder: Path, preprocessor: Preprocessor) -> None:
        super().__init__()
        self.model: Any = new_classifier(folder, ["unused"], from_scratch=False, freeze_backbone=True)
        check_input(self.model, preprocessor)
        head = {name.rpartition(".")[0] for name, value in self.model.named_parameters() if value.requires_grad}
        for name in head:
            self.model.set_submodule(name, nn.Identity())
        self.requires_grad_(True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features [B, D] of normalized pixels [B, 3, H, W]."""
        features: Tensor = self.model(pixel_values=pixels).logits
        return features


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
            {name: value.shape for name, value in _from_config(each).state_dict().items()} for each in (config, other)
        ]
    return tuple({f"{name.rpartition('.')[0]}." for name in shapes[0] if shapes[0][name] != shapes[1][name]})


def _read_config(folder: Path, **labels: Any) -> Any:
    """Read a folder's config.json; the encoder of a masked autoencoder is an ordinary ViT."""
    with errors_of_transformers(folder):
        config = transformers.AutoConfig.from_pretrained(folder, **LOADING, **labels)
        if config.model_type == "timm_wrapper" and config.model_args:
            config.model_args.pop("num_classes", None)  # transformers 5.24 passes it twice, and fails
        if config.model_type == "vit_mae":
            shared = config.to_dict().keys() & transformers.ViTConfig().to_dict().keys() - {"model_type"}
            config = transformers.ViTConfig(**{name: getattr(config, name) for name in shared} | labels)
    return config


def _from_config(config: Any) -> nn.Module:
    """Build a classifier with random weights, in float32 even if the config asks for another precision."""
    model: nn.Module = transformers.AutoModelForImageClassification.from_config(
        config, trust_remote_code=False, dtype=torch.float32
    )
    return model


def _load(folder: Path, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model in float32, and transformers' report about missing and mismatched tensors."""
    with errors_of_transformers(folder):
        loaded: tuple[Any, dict[str, Any]] = transformers.AutoModelForImageClassification.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            dtype=torch.float32,
            **LOADING,
            **options,
        )
    return loaded
