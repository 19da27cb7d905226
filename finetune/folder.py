"""What is checked in a Hugging Face folder before transformers loads it, and how its errors are reported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from pretrain.errors import UserError, first_line
from pretrain.hub import CONFIG_FILE, PROCESSOR_FILE, read_settings

transformers.utils.logging.set_verbosity_error()  # its load report is checked here, and errors are raised
transformers.utils.logging.disable_progress_bar()
if not torch.cuda.is_available():
    # Saving a model imports deepspeed, which otherwise looks for an accelerator and prints a warning.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Never ask the Hub, and never run or ask to run code of the folder's own.
LOADING = {"local_files_only": True, "trust_remote_code": False}


class ModelError(UserError):
    """A model folder that cannot be fine-tuned or used."""


def check_folder(folder: Path) -> None:
    """Check that this is a Hugging Face folder of a model that transformers has.

    Raises:
        ModelError: If it is not.
        UserError: If one of its files is damaged.
    """
    config_file, processor_file = folder / CONFIG_FILE, folder / PROCESSOR_FILE
    if not config_file.exists():
        raise ModelError(
            f"{folder}: not a Hugging Face folder (config.json is missing); create one with `vitrail export`"
        )
    content = read_settings(config_file)
    for file, settings in ((config_file, content), (processor_file, read_settings(processor_file))):
        if "auto_map" in settings:
            raise ModelError(
                f"{file}: this folder needs code of its own (auto_map), which is never run; "
                "use a model of an architecture that transformers has"
            )
    if "pretrained_cfg" in content and find_spec("timm") is None:
        raise ModelError(f"{config_file}: a model of timm, which is not installed; pip install timm torchvision")
    # Without a model type, transformers guesses one from the folder's name.
    if "model_type" not in content and "pretrained_cfg" not in content:
        raise ModelError(
            f"{config_file}: has no model_type, so transformers cannot load it; "
            "download the model in the format of transformers"
        )


@contextmanager
def errors_of_transformers(folder: Path) -> Iterator[None]:
    """Turn any error of transformers into a sentence about the folder.

    Files that others wrote make transformers raise errors of many kinds, which include those of Python and safetensors.

    Raises:
        ModelError: If transformers raises an error.
    """
    try:
        yield
    except ImportError as error:
        raise ModelError(f"{folder}: a package is not installed: {first_sentence(error)}; install it") from None
    except Exception as error:
        raise ModelError(
            f"{folder}: transformers cannot load it: {first_sentence(error)}; export or download it again"
        ) from None


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error's message."""
    return first_line(error).partition(". ")[0].rstrip(" .:;")
