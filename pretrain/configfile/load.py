"""Load a config from a YAML file and overrides."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from pretrain.config.schema import Key, dotted, leaves, plain, scalar, sections, sections_at
from pretrain.config.section import COMMAND_LINE_ONLY, Section
from pretrain.configfile.document import COMMAND_LINE, ConfigError, Document, Mistake
from pretrain.configfile.explain import explain

Config = TypeVar("Config", bound=Section)


@dataclass(frozen=True)
class Loaded(Generic[Config]):
    """A validated config.

    Attributes:
        config: The config.
        text: The whole config as YAML, with the origin of each value as a comment.
    """

    config: Config
    text: str


def load_config(config_class: type[Config], path: Path, overrides: Sequence[str] = ()) -> Loaded[Config]:
    """Read a YAML file, apply overrides and validate the result.

    Args:
        config_class: Class of the config.
        path: YAML file.
        overrides: Values of the form `key.path=value`, which replace the file's.

    Raises:
        ConfigError: If anything is wrong. The message names all mistakes, each with its file and line.
    """
    named = [key for key, section in sections(config_class) if "name" in section.model_fields]
    document = Document(path, {key: len(sections_at(config_class, key)) > 1 for key in named})
    for override in overrides:
        document.override(override)
    mistakes = document.mistakes
    try:
        config = config_class.model_validate_json(json.dumps(document.values))
    except ValidationError as error:
        mistakes = explain(document, config_class, error)
    else:
        mistakes += _command_line_only_mistakes(document, config)
    if mistakes:
        raise ConfigError("\n".join(str(mistake) for mistake in sorted(mistakes, key=lambda each: each.line)))
    return Loaded(config, "".join(f"{line}\n" for line in _text(config, document.places)))


def _command_line_only_mistakes(document: Document, config: Section) -> Iterator[Mistake]:
    """Yield the values of a file that only the command line may change from their defaults."""
    values = flatten(config)
    for key, field in leaves(type(config)):
        extra, place = field.json_schema_extra, document.places.get(key, COMMAND_LINE)
        is_marked = isinstance(extra, dict) and COMMAND_LINE_ONLY in extra
        if is_marked and place != COMMAND_LINE and values[dotted(key)] != field.default:
            sentence = f"a config file must not set this; remove it here and add {dotted(key)}=... to the command"
            yield Mistake(place, key, sentence)


def flatten(config: Section, above: str = "") -> dict[str, Any]:
    """Return all values of a config by dotted key."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        flat |= flatten(value, f"{above}{name}.") if isinstance(value, Section) else {above + name: plain(value)}
    return flat


def _text(section: Section, places: dict[Key, str], above: Key = ()) -> Iterator[str]:
    """Yield the YAML of a section line by line, each value with its origin as a comment."""
    for name in type(section).model_fields:
        value, key = getattr(section, name), (*above, name)
        indent = "  " * len(above)
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _text(value, places, key)
        else:
            yield f"{f'{indent}{name}: {scalar(plain(value))}':<56}  # {places.get(key, 'default')}"
