"""Find models of Hugging Face on this machine, and read their settings. Nothing is ever downloaded."""

import json
import re
from pathlib import Path
from typing import Any

from pretrain.errors import UserError, first_line

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
MODEL_FOLDER = "model"  # in the folder of a fine-tuning run
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # also the form of a relative path of two parts


def find_model(path: Path) -> Path:
    """Return the folder of a model: `path` itself, the model of a fine-tuning run, or a Hub model in the local cache.

    Args:
        path: Folder, or the id of a model on the Hub, such as google/vit-base-patch16-224.

    Returns:
        The folder that the path stands for. Whether it has a usable model is not checked.

    Raises:
        UserError: If there is neither; the message has the command that downloads a model.
    """
    if (path / MODEL_FOLDER / CONFIG_FILE).exists() and not (path / CONFIG_FILE).exists():
        return path / MODEL_FOLDER
    if path.exists() or not HUB_ID.fullmatch(str(path)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(
            f"{path}: no such folder; create it first, or, for a model of the Hugging Face Hub, download it with: "
            f"hf download {path} --local-dir {path}"
        ) from None


def read_settings(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model's folder; empty if there is no such file.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}; export or download the folder again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a JSON object; export or download the folder again")
    return content
