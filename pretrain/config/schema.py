"""Walk through the sections and keys of a config class, for error messages, help texts and documentation.

A key is a tuple of names: ("optimizer", "learning_rate") is written as optimizer.learning_rate. The section `objective`
is a union, whose alternatives differ in the value of their key `name`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pretrain.config.section import Location, Section, with_home

Key: TypeAlias = tuple[str | int, ...]


def dotted(key: Key) -> str:
    """Return a key as it is written on the command line."""
    return ".".join(str(part) for part in key)


def sections(config_class: type[Section], above: Key = ()) -> Iterator[tuple[Key, type[Section]]]:
    """Yield the key and class of every section, in the order of the config, starting with `config_class` itself.

    A union yields each of its alternatives; a class that several alternatives contain under one key comes once.
    """
    yield above, config_class
    seen = set()
    for name, field in config_class.model_fields.items():
        for alternative in alternatives(field):
            for found in sections(alternative, (*above, name)):
                if found not in seen:
                    yield found
                seen.add(found)


def leaves(config_class: type[Section]) -> Iterator[tuple[Key, FieldInfo]]:
    """Yield every key that holds a value rather than a section; a key of several alternatives comes once."""
    seen = set()
    for above, section in sections(config_class):
        for name, field in section.model_fields.items():
            key = (*above, name)
            if key not in seen and not alternatives(field):
                yield key, field
            seen.add(key)


def alternatives(field: FieldInfo) -> list[type[Section]]:
    """Return the section classes that a field may hold: none, one, or several for a union."""
    candidates = [getattr(one, "__origin__", one) for one in (field.annotation, *get_args(field.annotation))]
    return [one for one in candidates if isinstance(one, type) and issubclass(one, Section)]


def holds_path(field: FieldInfo) -> bool:
    """Return whether a field's value is a path or URL, or may be one, or a list of them."""

    def found(annotation: Any) -> bool:
        return annotation in (Path, Location) or any(map(found, get_args(annotation)))

    return found(field.rebuild_annotation())


def union_name(section: type[Section]) -> str:
    """Return the value of `name` that selects a section among the alternatives of its union."""
    return str(section.model_fields["name"].default) if "name" in section.model_fields else ""


def sections_at(config_class: type[Section], location: Key) -> list[type[Section]]:
    """Return the section classes that are possible at a location.

    Args:
        config_class: Class of the whole config.
        location: Key of a section. The name of an alternative may follow a union, which leaves only that one.
    """
    found = [config_class]
    for part in location:
        if len(found) > 1 and any(union_name(section) == part for section in found):
            found = [section for section in found if union_name(section) == part]
        else:
            fields = [section.model_fields[str(part)] for section in found if str(part) in section.model_fields]
            found = [alternative for field in fields for alternative in alternatives(field)]
    return found


def field_at(config_class: type[Section], key: Key) -> FieldInfo | None:
    """Return the field of a key, or None if there is no such key."""
    fields = [section.model_fields.get(str(key[-1])) for section in sections_at(config_class, key[:-1])] if key else []
    return next((field for field in fields if field), None)


def default_text(field: FieldInfo) -> str:
    """Return a field's default as YAML on one line, or "required". A path in the home folder begins with ~."""
    default = field.default
    home = Path(with_home("~"))
    if isinstance(default, Path) and default.is_relative_to(home):
        default = Path("~") / default.relative_to(home)
    return "required" if default is PydanticUndefined else scalar(plain(default))


def plain(value: Any) -> Any:
    """Return a value as YAML and JSON represent it."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def scalar(value: Any) -> str:
    """Return a plain value as YAML on one line, which is read back as the same value."""
    is_word = isinstance(value, str) and re.fullmatch(r"[A-Za-z_~./][\w./-]*", value)
    return str(value) if is_word and value not in ("null", "true", "false", "~") else json.dumps(value)
