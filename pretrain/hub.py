"""Find models on this machine, in folders of Hugging Face or in the cache of its Hub. Nothing is ever downloaded."""

import re
from pathlib import Path

from pretrain.errors import UserError

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
    if (path / MODEL_FOLDER / "config.json").exists() and not (path / "config.json").exists():
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
