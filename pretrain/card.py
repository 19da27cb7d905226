"""What the model cards of both stages have in common. A card has names, but no path of the machine that made it."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from pretrain import __version__
from pretrain.config import Section
from pretrain.config.schema import Key, holds_path, leaves

MAX_CLASSES = 50  # named in a card; config.json has all of them
SPLITS = ("train", "val", "validation", "test")

USAGE_OF_CLASSIFIER = """```python
from transformers import pipeline

classify = pipeline("image-classification", model="path/to/this/folder")
print(classify("image.jpg"))
```

`vitrail predict path/to/this/folder image.jpg` classifies it on the command line."""


def front_matter(
    name: str, tags: Sequence[str], *, is_classifier: bool, data: str = "", top1: float | None = None
) -> str:
    """Return the metadata at the start of a card, as the Hugging Face Hub reads them.

    Args:
        name: Name of the model.
        tags: Tags besides "vision" and "vitrail".
        is_classifier: Whether the model classifies images.
        data: Name of the validation data.
        top1: Accuracy on the validation data, or None if it was not measured.
    """
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification" if is_classifier else "image-feature-extraction",
        "license": "unknown",
        "tags": ["vision", "vitrail", *tags],
    }
    if is_classifier and top1 is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": "imagefolder"},
            "metrics": [{"type": "accuracy", "value": round(top1, 4)}],
        }
        fields["model-index"] = [{"name": name, "results": [result]}]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def class_list(names: Sequence[str]) -> str:
    """Return the number of classes and their names, of which many are left to config.json."""
    shown = ", ".join(f"`{name}`" for name in names[:MAX_CLASSES])
    more = len(names) - MAX_CLASSES
    rest = f", and {more} more, which are in `id2label` of `config.json`" if more > 0 else ""
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'}: {shown}{rest}."


def versions() -> str:
    """Return the versions of the libraries that have written the folder."""
    others = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return ", ".join([f"vitrail {__version__}", *others])


def data_names(locations: str | Sequence[str] | None) -> str:
    """Return the names of datasets, given their paths or URLs: that of the folder, or of the folder of the split."""
    if locations is None:
        return "none"
    names = [_data_name(place) for place in ([locations] if isinstance(locations, str) else locations)]
    return ", ".join(dict.fromkeys(filter(None, names))) or "unnamed"


def _data_name(location: str) -> str:
    if location.startswith("pipe:"):
        return ""
    parts = PurePosixPath(urlsplit(location).path if "://" in location else location).parts
    name, above = (parts or ("",))[-1], parts[-2] if len(parts) > 1 else ""
    return (above if name in SPLITS and above else name).strip("/.")


def config_json(config: Section) -> str:
    """Return a config as JSON without its paths and URLs, which belong to the machine of the run."""
    values = config.model_dump(mode="json")
    for key, field in leaves(type(config)):
        if holds_path(field):
            _remove(values, key)
    return json.dumps(values, indent=2)


def _remove(values: dict[str, Any], key: Key) -> None:
    """Remove a value from nested sections, if it is there."""
    *above, name = map(str, key)
    for part in above:
        values = values.get(part, {})
    values.pop(name, None)
