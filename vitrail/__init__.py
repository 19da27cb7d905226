"""Use datasets and models of Vitrail in a notebook: docs/notebook.md is the guide.

- `open_dataset`: open shards or a folder of images as a torch Dataset.
- `load_encoder`, `embed`: compute the features of images.
- `load_classifier`, `predict`: classify images, exactly as `vitrail predict` does.

What cannot work raises an error whose message names the problem and the fix: `UserError` for a mistake that the user
can fix, `MachineError` for a failure of the machine or the network. Importing this package imports no torch; that
happens when one of its names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from vitrail.shadowing import check_packages

__all__ = [
    "Classifier",
    "Encoder",
    "ImageDataset",
    "MachineError",
    "UserError",
    "__version__",
    "embed",
    "load_classifier",
    "load_encoder",
    "open_dataset",
    "predict",
]

_MODULES = {
    "Classifier": "finetune.predict",
    "Encoder": "vitrail.models",
    "ImageDataset": "vitrail.dataset",
    "MachineError": "pretrain.errors",
    "UserError": "pretrain.errors",
    "__version__": "pretrain",
    "embed": "vitrail.models",
    "load_classifier": "vitrail.models",
    "load_encoder": "vitrail.models",
    "open_dataset": "vitrail.dataset",
    "predict": "vitrail.models",
}

if TYPE_CHECKING:
    from finetune.predict import Classifier
    from pretrain import __version__
    from pretrain.errors import MachineError, UserError
    from vitrail.dataset import ImageDataset, open_dataset
    from vitrail.models import Encoder, embed, load_classifier, load_encoder, predict
else:

    def __getattr__(name: str) -> object:
        """Import a name when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module 'vitrail' has no attribute '{name}'; it has {', '.join(__all__)}")
        check_packages()
        value: object = getattr(import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
