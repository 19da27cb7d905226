"""YAML and dotted overrides become a validated config; every mistake is named with file, line, key and the likely word.

Scalars are read as YAML 1.2 does: `1e-4` is a number, `no` is a word, `12:30` is text, equal keys are an error.
"""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from pretrain.config import Section
from pretrain.errors import UserError
from pretrain.outcome import EXIT_USER_ERROR

Config = TypeVar("Config", bound=Section)
Key = tuple[str | int, ...]

# What engineers coming from other tools type; nothing here is accepted, it only makes the answer better.
SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "eps": "epsilon",
    "batch_size": "global_batch_size",
    "depth": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "dim": "hidden_size",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "heads": "num_attention_heads",
    "img_size": "image_size",
    "workers": "num_workers",
    "steps": "total_steps",
    "max_steps": "total_steps",
    "clip_grad": "gradient_clipping",
    "grad_clip": "gradient_clipping",
    "stage": "zero_stage",
    "output_dir": "run_dir",
    "smoothing": "label_smoothing",
    "reprob": "erasing",
}
BOOLEAN_WORDS = {"no": "false", "off": "false", "n": "false", "yes": "true", "on": "true", "y": "true"}


class ConfigError(UserError):
    """A user's mistakes, one a line."""


@dataclass(frozen=True)
class Mistake:
    """One mistake: where it stands, which key, and a sentence."""

    place: str
    key: Key
    sentence: str

    def __str__(self) -> str:
        return f"{self.place}: {_dotted(self.key)}: {self.sentence}" if self.key else f"{self.place}: {self.sentence}"


@dataclass(frozen=True)
class Loaded(Generic[Config]):
    """A config with its text: every value resolved, each line saying where it came from."""

    config: Config
    text: str


@dataclass(frozen=True)
class CommandLine(Generic[Config]):
    """What the user asked of a launch script."""

    config: Config
    text: str
    resume: bool


def read_command_line(
    config_class: type[Config], description: str, example: str, *, resumable: bool
) -> CommandLine[Config]:
    """Parse `--config FILE key.path=value ...`; print the mistakes and exit with code 2 if there are any."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}\n\nkeys and defaults:\n{_reference(config_class)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file with the keys below")
    parser.add_argument("--print-config", action="store_true", help="print every value and its origin, then stop")
    if resumable:
        insist = "insist on continuing: fail if the run has no checkpoint"
        parser.add_argument("--resume", action="store_true", help=insist)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces the file's value")
    arguments = parser.parse_intermixed_args()
    try:
        loaded = load_config(config_class, arguments.config, arguments.overrides)
    except ConfigError as error:
        exit_with_mistake(str(error))
    if arguments.print_config:
        if is_first_rank():
            print(loaded.text, end="")
        sys.exit(0)
    return CommandLine(loaded.config, loaded.text, resumable and arguments.resume)


def exit_with_mistake(message: str) -> NoReturn:
    """Print a user's mistake, once however many ranks there are, and exit with code 2."""
    if is_first_rank():
        print(message, file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def is_first_rank() -> bool:
    """Say whether this process speaks for the run; known from the environment before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def load_config(config_class: type[Config], path: Path, overrides: Sequence[str] = ()) -> Loaded[Config]:
    """Read `path`, apply `overrides`, validate.

    Raises:
        ConfigError: every mistake at once, each with its file and line.
    """
    document = _Document(path)
    for override in overrides:
        document.override(override)
    mistakes = document.mistakes
    try:
        config = config_class.model_validate_json(json.dumps(document.values))
    except ValidationError as error:
        mistakes = document.explain(config_class, error)
    if mistakes:
        raise ConfigError("\n".join(str(mistake) for mistake in mistakes))
    return Loaded(config, "".join(f"{line}\n" for line in _text(config, document.places)))


def flatten(config: Section, above: str = "") -> dict[str, Any]:
    """Return a config's values by dotted key."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        flat |= flatten(value, f"{above}{name}.") if isinstance(value, Section) else {above + name: _plain(value)}
    return flat


# --- reading -----------------------------------------------------------------------------------------------------


class _Yaml(yaml.SafeLoader):
    """PyYAML's parser with the scalars of YAML 1.2's core schema."""


_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", lambda _: None),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", int),
    "tag:yaml.org,2002:float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    "tag:yaml.org,2002:str": (r"(?!)", str),
}
_Yaml.yaml_implicit_resolvers = {}
for _tag, (_pattern, _) in _SCALARS.items():
    _Yaml.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)


class _Document:
    """The values of a file and its overrides, and the place each came from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[Key, str] = {}
        self.mistakes: list[Mistake] = []
        self.values: dict[str, Any] = {}
        self.undecided: set[Key] = set()  # names that do not say which section of a union is meant
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        node = self._compose(text, str(path))
        values = self._construct(node, (), lambda node: f"{path}:{node.start_mark.line + 1}") if node else {}
        if isinstance(values, dict):
            self.values = values
        else:
            raise ConfigError(f"{path}:1: expected keys with values, got {_shown(values)}")

    def override(self, text: str) -> None:
        """Set one value from `key.path=value`."""
        dotted, equals, value = text.partition("=")
        key = tuple(dotted.split("."))
        if not equals or not all(key):
            self.mistakes.append(Mistake("command line", (), f"expected key.path=value, got {text!r}"))
            return
        try:
            node = self._compose(value, "command line")
        except ConfigError as error:
            self.mistakes.append(Mistake("command line", key, str(error).removeprefix("command line: ")))
            return
        section = self.values
        for i, part in enumerate(key[:-1], start=1):
            section = section.setdefault(part, {})
            self.places.setdefault(key[:i], "command line")
            if not isinstance(section, dict):
                self.mistakes.append(Mistake("command line", key, f"{_dotted(key[:i])} is a value, not a section"))
                return
        section[key[-1]] = self._construct(node, key, lambda _: "command line") if node else None
        self.places[key] = "command line"

    def _compose(self, text: str, name: str) -> yaml.Node | None:
        try:
            for token in yaml.scan(text):
                if isinstance(token, yaml.AliasToken):
                    problem = "aliases (*name) are not supported; write the value out"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=token.start_mark)
            return yaml.compose(text, Loader=_Yaml)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark and name != "command line" else ""
            raise ConfigError(f"{name}{line}: not valid YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: not valid YAML: {error}") from None

    def _construct(self, node: yaml.Node, key: Key, place: Callable[[yaml.Node], str]) -> Any:
        """Turn a node into plain values, noting the place of each."""
        self.places[key] = place(node)
        if isinstance(node, yaml.MappingNode):
            return self._construct_mapping(node, key, place)
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(item, (*key, i), place) for i, item in enumerate(node.value)]
        if node.tag not in _SCALARS:
            self.mistakes.append(Mistake(place(node), key, f"the tag {node.tag} is not supported"))
            return None
        try:
            return _SCALARS[node.tag][1](node.value)
        except ValueError:
            self.mistakes.append(Mistake(place(node), key, f"{_shown(node.value)} is not what its tag says"))
            return None

    def _construct_mapping(self, node: yaml.MappingNode, key: Key, place: Callable[[yaml.Node], str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            here = (*key, name)
            if name in values:
                first = self.places[here].rpartition(":")[2]
                self.mistakes.append(Mistake(place(name_node), here, f"duplicate key, first set on line {first}"))
                continue
            values[name] = self._construct(value_node, here, place)
            self.places[here] = place(name_node)
        return values

    def explain(self, config_class: type[Section], error: ValidationError) -> list[Mistake]:
        """Return all mistakes, those of reading and pydantic's, one for each key."""
        found = {mistake.key: mistake for mistake in self.mistakes}
        self._explain(config_class, error, found)
        # Pydantic judges combinations only in sections without other errors: look again without what is wrong.
        for key in [key for key in found if key in self.places]:
            _delete(self.values, key[:-1] if key in self.undecided else key)
        try:
            config_class.model_validate_json(json.dumps(self.values))
        except ValidationError as second:
            self._explain(config_class, second, found)
        return [mistake for mistake in self.mistakes if not mistake.key] + [found[key] for key in found if key]

    def _explain(self, config_class: type[Section], error: ValidationError, found: dict[Key, Mistake]) -> None:
        for detail in error.errors(include_url=False):
            key = self._key(detail["loc"], config_class)
            if detail["type"] == "union_tag_invalid":
                self.undecided.add(key := (*key, "name"))
            section = key[: len(detail["loc"]) - 1]
            involved = {(*section, *name.split(".")) for name in detail.get("ctx", {}).get("keys", ())}
            if key not in found and not involved & found.keys():
                found[key] = Mistake(self._place(key), key, _sentence(detail, key, config_class))

    def _key(self, location: Key, config_class: type[Section]) -> Key:
        """Drop what pydantic puts into a location beside keys: tags of unions."""
        key: Key = ()
        for part in location:
            inside = (*key, part)
            if inside in self.places or _field(config_class, inside):
                key = inside
        return key

    def _place(self, key: Key) -> str:
        """Return where a key stands, or the nearest section above it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, str(self.path)) if key else str(self.path)


# --- explaining --------------------------------------------------------------------------------------------------


def _sentence(error: ErrorDetails, key: Key, config_class: type[Section]) -> str:
    """Say what was expected and the likely fix."""
    kind, context, got = error["type"], error.get("ctx", {}), _shown(error["input"])
    match kind:
        case "impossible":
            return str(context["sentence"])
        case "extra_forbidden":
            return f"unknown key{_suggestion(error['loc'], key, config_class)}"
        case "missing" if isinstance(error["loc"][-1], int):
            return f"expected more values, got {got}"
        case "missing":
            return "missing, and it has no default"
        case "literal_error":
            return _expected_one_of(context["expected"], error["input"])
        case "union_tag_invalid":
            return _expected_one_of(" or ".join(context["expected_tags"].rsplit(", ", 1)), context["tag"])
        case "bool_type":
            word = BOOLEAN_WORDS.get(str(error["input"]).lower())
            return f"expected true or false, got {got}" + (f"; write {word}" if word else "")
        case "int_type" | "int_from_float":
            return f"expected a whole number, got {got}"
        case "float_type" | "float_parsing":
            return f"expected a number, got {got}"
        case "model_type" | "model_attributes_type":
            return f"expected a section of keys, got {got}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            bound = kind.replace("_", " ").replace("equal", "or equal").replace(" than or", " than or")
            return f"expected a number {bound} to {next(iter(context.values()))}, got {got}".replace("than to", "than")
        case "too_short" | "too_long":
            return f"expected {context.get('min_length', context.get('max_length'))} values, got {got}"
        case "path_type" | "string_type":
            return f"expected text, got {got}"
        case "tuple_type" | "list_type":
            return f"expected a list, got {got}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {got}"


def _expected_one_of(expected: str, value: Any) -> str:
    choices = re.findall(r"[\w.-]+", expected.replace(" or ", " "))
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    return f"expected {expected}, got {_shown(value)}" + (f"; did you mean {near[0]}?" if near else "")


def _suggestion(location: Key, key: Key, config_class: type[Section]) -> str:
    """Return the likely word for an unknown key: a neighbor, or the same name in another section."""
    word = SYNONYMS.get(str(key[-1]), str(key[-1]))
    sections = _sections(config_class, location[:-1])
    neighbors = [name for section in sections for name in section.model_fields]
    others = {name: _name(section) for section in _sections(config_class, key[:-1]) for name in section.model_fields}
    everywhere = {str(leaf[-1]): _dotted(leaf) for leaf, _ in _leaves(config_class)}
    if word in neighbors:
        return f"; did you mean {word}?"
    if word in everywhere and word not in others:
        return f"; did you mean {everywhere[word]}?"
    if near := difflib.get_close_matches(word, [*neighbors, *others], n=1):
        other = "" if near[0] in neighbors else f", which {_dotted((*key[:-1], 'name'))}={others[near[0]]} has"
        return f"; did you mean {near[0]}{other}?"
    if near := difflib.get_close_matches(word, list(everywhere), n=1, cutoff=0.75):
        return f"; did you mean {everywhere[near[0]]}?"
    return f"; the keys here are {', '.join(neighbors)}" if neighbors else ""


def _delete(values: Any, key: Key) -> None:
    """Remove the value at `key`."""
    *sections, name = key
    for part in sections:
        values = values[part] if isinstance(values, dict) and part in values else None
    if isinstance(values, dict):
        values.pop(name, None)


def _sections(config_class: type[Section], location: Key) -> list[type[Section]]:
    """Return the section classes that may stand at a location; where a union has been decided there is one."""
    found = [config_class]
    for part in location:
        if len(found) > 1 and any(_name(section) == part for section in found):
            found = [section for section in found if _name(section) == part]
        else:
            fields = [section.model_fields[str(part)] for section in found if str(part) in section.model_fields]
            found = [alternative for field in fields for alternative in _alternatives(field)]
    return found


def _alternatives(field: FieldInfo) -> list[type[Section]]:
    """Return the section classes that a field may hold."""
    candidates = [getattr(one, "__origin__", one) for one in (field.annotation, *get_args(field.annotation))]
    return [one for one in candidates if isinstance(one, type) and issubclass(one, Section)]


def _name(section: type[Section]) -> str:
    """Return the name by which a section is told from the others of its union."""
    return str(section.model_fields["name"].default) if "name" in section.model_fields else ""


def _field(config_class: type[Section], key: Key) -> FieldInfo | None:
    fields = [section.model_fields.get(str(key[-1])) for section in _sections(config_class, key[:-1])] if key else []
    return next((field for field in fields if field), None)


def _leaves(config_class: type[Section], above: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    """Yield every key that holds a value, in the order of the config; what several of a union have, once."""
    for name, field in config_class.model_fields.items():
        here = (*above, name)
        seen: set[Key] = set()
        for section in _alternatives(field):
            leaves = [leaf for leaf in _leaves(section, here) if leaf[0] not in seen]
            seen |= {key for key, _ in leaves}
            yield from leaves
        if not seen:
            yield here, field


def _reference(config_class: type[Section]) -> str:
    """List every key with its default and meaning."""
    lines = []
    for key, field in _leaves(config_class):
        default = "required" if field.default is PydanticUndefined else _scalar(_plain(field.default))
        lines.append(f"  {_dotted(key) + ': ' + default:<52} {field.description or ''}".rstrip())
    return "\n".join(lines)


def _text(section: Section, places: dict[Key, str], above: Key = ()) -> Iterator[str]:
    """Yield the YAML of a section, each value with its origin as a comment."""
    for name in type(section).model_fields:
        value, key = getattr(section, name), (*above, name)
        indent = "  " * len(above)
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _text(value, places, key)
        else:
            yield f"{f'{indent}{name}: {_scalar(_plain(value))}':<56}  # {places.get(key, 'default')}"


def _plain(value: Any) -> Any:
    """Return a value as YAML and JSON know it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _scalar(value: Any) -> str:
    """Write a value on one line, so that reading it gives the same value."""
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z_./][\w./-]*", value)
        and value not in ("null", "true", "false")
    ):
        return value
    return json.dumps(value)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)
