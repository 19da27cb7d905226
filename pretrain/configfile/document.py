"""A config file and its overrides as plain values, with the place where each was set.

Scalars follow YAML 1.2: `1e-4` is a number, `no` is text, `12:30` is text, and a duplicate key is an error.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.config.schema import Key, dotted
from pretrain.errors import UserError

COMMAND_LINE = "command line"
TEXT = "tag:yaml.org,2002:str"


class ConfigError(UserError):
    """Mistakes in a config, one per line."""


@dataclass(frozen=True)
class Mistake:
    """A single mistake in a config.

    Attributes:
        place: File and line, or "command line".
        key: Key of the value; empty if the mistake belongs to no key.
        sentence: Explanation of the form `<what is wrong>; <how to fix it>`.
    """

    place: str
    key: Key
    sentence: str

    @property
    def line(self) -> int:
        """Line of the file, or 0 for the command line."""
        number = self.place.rpartition(":")[2]
        return int(number) if number.isdigit() else 0

    def __str__(self) -> str:
        return f"{self.place}: {dotted(self.key)}: {self.sentence}" if self.key else f"{self.place}: {self.sentence}"


class _Yaml(yaml.SafeLoader):
    """PyYAML's parser with the scalars of YAML 1.2's core schema."""


_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", lambda _: None),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", int),
    "tag:yaml.org,2002:float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    TEXT: (r"(?!)", str),
}
_Yaml.yaml_implicit_resolvers = {}
for _tag, (_pattern, _) in _SCALARS.items():
    _Yaml.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)


class Document:
    """The values of a file and its overrides, and where each of them was set.

    Args:
        path: YAML file to read.
        named_sections: Sections that have a `name`, by key; `objective: mae` is short for `objective: {name: mae}`. The
            value tells whether the name decides which other keys the section has. If not, an override of this form
            leaves the other keys of the file as they are.

    Raises:
        ConfigError: If the file cannot be read, is not valid YAML, or does not contain keys.
    """

    def __init__(self, path: Path, named_sections: Mapping[Key, bool] | None = None) -> None:
        self.path = path
        self._named_sections = named_sections or {}
        self.places: dict[Key, str] = {}
        self.mistakes: list[Mistake] = []
        self.values: dict[str, Any] = {}
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{path}: cannot read the config file ({reason}); check the path") from None
        node = self._compose(text, str(path))
        values = self._construct(node, (), lambda node: f"{path}:{node.start_mark.line + 1}") if node else {}
        if isinstance(values, dict):
            self.values = values
        else:
            raise ConfigError(f"{path}:1: must contain keys and values, got {shown(values)}; write key: value")

    def override(self, text: str) -> None:
        """Set one value from `key.path=value`."""
        name, equals, value = text.partition("=")
        key = tuple(name.split("."))
        if self._named_sections.get(key) is False and isinstance(self.values.get(name), dict) and value.isidentifier():
            key = (*key, "name")
        if not equals or not all(key):
            self.mistakes.append(Mistake(COMMAND_LINE, (), f"cannot parse {text!r}; write it as key.path=value"))
            return
        try:
            node = self._compose(value, COMMAND_LINE)
        except ConfigError as error:
            self.mistakes.append(Mistake(COMMAND_LINE, key, str(error).removeprefix(f"{COMMAND_LINE}: ")))
            return
        section = self.values
        for i, part in enumerate(key[:-1], start=1):
            section = section.setdefault(part, {})
            self.places.setdefault(key[:i], COMMAND_LINE)
            if not isinstance(section, dict):
                parent = dotted(key[:i])
                sentence = f"{parent} is a value, not a section; set {parent} itself"
                self.mistakes.append(Mistake(COMMAND_LINE, key, sentence))
                return
        section[key[-1]] = self._construct(node, key, lambda _: COMMAND_LINE) if node else None
        self.places[key] = COMMAND_LINE

    def _compose(self, text: str, name: str) -> yaml.Node | None:
        try:
            for token in yaml.scan(text):
                if isinstance(token, yaml.AliasToken):
                    problem = "aliases (*name) are not supported; write the value out"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=token.start_mark)
            return yaml.compose(text, Loader=_Yaml)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark and name != COMMAND_LINE else ""
            sentence = str(error.problem)
            if "; " not in sentence:
                sentence = f"not valid YAML ({sentence}); correct the syntax"
            raise ConfigError(f"{name}{line}: {sentence}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: not valid YAML ({error}); correct the syntax") from None

    def _construct(self, node: yaml.Node, key: Key, place: Callable[[yaml.Node], str]) -> Any:
        """Turn a node into plain values and record the place of each."""
        self.places[key] = place(node)
        if isinstance(node, yaml.MappingNode):
            return self._construct_mapping(node, key, place)
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(item, (*key, i), place) for i, item in enumerate(node.value)]
        if node.tag not in _SCALARS:
            sentence = f"the YAML tag {node.tag} is not supported; write the value without a tag"
            self.mistakes.append(Mistake(place(node), key, sentence))
            return None
        if key in self._named_sections and node.tag == TEXT:
            self.places[(*key, "name")] = place(node)
            return {"name": node.value}
        try:
            return _SCALARS[node.tag][1](node.value)
        except ValueError:
            sentence = f"{shown(node.value)} does not match its YAML tag; write the value without a tag"
            self.mistakes.append(Mistake(place(node), key, sentence))
            return None

    def _construct_mapping(self, node: yaml.MappingNode, key: Key, place: Callable[[yaml.Node], str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            here = (*key, name)
            if name in values:
                first = self.places[here].rpartition(":")[2]
                sentence = f"duplicate key, first set on line {first}; remove one of the two"
                self.mistakes.append(Mistake(place(name_node), here, sentence))
                continue
            values[name] = self._construct(value_node, here, place)
            self.places[here] = place(name_node)
        return values

    def place(self, key: Key) -> str:
        """Return where a key was set, or the closest section above it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, str(self.path)) if key else str(self.path)


def shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    return json.dumps(value, default=str)
