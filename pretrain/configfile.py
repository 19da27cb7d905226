"""Read a config from YAML and dotted overrides. Every mistake is reported with file, line, key and the likely fix.

Scalars follow YAML 1.2: `1e-4` is a number, `no` is text, `12:30` is text, and a duplicate key is an error.
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
from typing import Any, Generic, NoReturn, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pretrain.config.schema import (
    Key,
    alternatives,
    default_text,
    dotted,
    field_at,
    leaves,
    plain,
    scalar,
    sections,
    sections_at,
    union_name,
)
from pretrain.config.section import Section
from pretrain.errors import UserError
from pretrain.outcome import EXIT_USER_ERROR

Config = TypeVar("Config", bound=Section)

COMMAND_LINE = "command line"
# Names from other tools. None is accepted; they only improve the suggestion for an unknown key.
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

    def __str__(self) -> str:
        return f"{self.place}: {dotted(self.key)}: {self.sentence}" if self.key else f"{self.place}: {self.sentence}"


@dataclass(frozen=True)
class Loaded(Generic[Config]):
    """A validated config.

    Attributes:
        config: The config.
        text: The whole config as YAML, with the origin of each value as a comment.
    """

    config: Config
    text: str


@dataclass(frozen=True)
class CommandLine(Generic[Config]):
    """The parsed command line of a launch script.

    Attributes:
        config: The config.
        text: The whole config as YAML, with the origin of each value as a comment.
        resume: Whether the run must continue from a checkpoint.
    """

    config: Config
    text: str
    resume: bool


def read_command_line(
    config_class: type[Config], description: str, example: str, *, resumable: bool
) -> CommandLine[Config]:
    """Parse `--config FILE key.path=value ...`. On mistakes, print them and exit with code 2.

    Args:
        config_class: Class of the config.
        description: Purpose of the script, for --help.
        example: Command line to show in --help.
        resumable: Whether the script has the option --resume.
    """
    arguments = build_parser(config_class, description, example, resumable=resumable).parse_intermixed_args()
    try:
        loaded = load_config(config_class, arguments.config, arguments.overrides)
    except ConfigError as error:
        exit_with_mistake(str(error))
    if arguments.print_config:
        if is_first_rank():
            print(loaded.text, end="")
        sys.exit(0)
    return CommandLine(loaded.config, loaded.text, resumable and arguments.resume)


def build_parser(
    config_class: type[Section], description: str, example: str, *, resumable: bool
) -> argparse.ArgumentParser:
    """Build the command-line parser of a launch script.

    Args:
        config_class: Class of the config.
        description: What the script does, for --help.
        example: Command line to show in --help.
        resumable: Whether the script has the option --resume.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}\n\nkeys and defaults:\n{_reference(config_class)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file with the config")
    parser.add_argument("--print-config", action="store_true", help="print every value with its origin and exit")
    if resumable:
        resume_help = "fail if the run has no checkpoint to resume from (without it, such a run starts from step 0)"
        parser.add_argument("--resume", action="store_true", help=resume_help)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the file's")
    return parser


def exit_with_mistake(message: str) -> NoReturn:
    """Print a user's mistake on the first rank and exit with code 2."""
    if is_first_rank():
        print(message, file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def is_first_rank() -> bool:
    """Return whether this process has rank 0, read from the environment because torch is not imported yet."""
    return os.environ.get("RANK", "0") == "0"


def load_config(config_class: type[Config], path: Path, overrides: Sequence[str] = ()) -> Loaded[Config]:
    """Read a YAML file, apply overrides and validate the result.

    Args:
        config_class: Class of the config.
        path: YAML file.
        overrides: Values of the form `key.path=value`, which replace the file's.

    Raises:
        ConfigError: If anything is wrong. The message names all mistakes, each with its file and line.
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
    """Return all values of a config by dotted key."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        flat |= flatten(value, f"{above}{name}.") if isinstance(value, Section) else {above + name: plain(value)}
    return flat


def _reference(config_class: type[Section]) -> str:
    """Return every key with its default and description, by section."""
    lines = []
    for above, section in sections(config_class):
        fields = {key: field for key, field in section.model_fields.items() if not alternatives(field)}
        if above:
            name = f" with name={union_name(section)}" if len(sections_at(config_class, above)) > 1 else ""
            is_union = name and "name" in fields
            lines += ["", f"{dotted(above)}{name if is_union else ''}:"]
        for name, field in fields.items():
            lines.append(f"  {dotted((*above, name)) + ': ' + default_text(field):<52} {field.description or ''}")
    return "\n".join(lines)


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
    """The values of a file and its overrides, and where each of them was set.

    Args:
        path: YAML file to read.

    Raises:
        ConfigError: If the file cannot be read, is not valid YAML, or does not contain keys.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[Key, str] = {}
        self.mistakes: list[Mistake] = []
        self.values: dict[str, Any] = {}
        self.undecided: set[Key] = set()  # keys `name` whose value selects no alternative of a union
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
            raise ConfigError(f"{path}:1: must contain keys and values, got {_shown(values)}; write key: value")

    def override(self, text: str) -> None:
        """Set one value from `key.path=value`."""
        name, equals, value = text.partition("=")
        key = tuple(name.split("."))
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
        try:
            return _SCALARS[node.tag][1](node.value)
        except ValueError:
            sentence = f"{_shown(node.value)} does not match its YAML tag; write the value without a tag"
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

    def explain(self, config_class: type[Section], error: ValidationError) -> list[Mistake]:
        """Return all mistakes, from reading and from validation, at most one per key."""
        found = {mistake.key: mistake for mistake in self.mistakes}
        self._explain(config_class, error, found)
        # Pydantic checks combinations only in sections without other errors: validate again without the wrong values.
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
        """Return the key of pydantic's location, which also contains the names of alternatives."""
        key: Key = ()
        for part in location:
            inside = (*key, part)
            if inside in self.places or field_at(config_class, inside):
                key = inside
        return key

    def _place(self, key: Key) -> str:
        """Return where a key was set, or the closest section above it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, str(self.path)) if key else str(self.path)


# --- explaining --------------------------------------------------------------------------------------------------


def _sentence(error: ErrorDetails, key: Key, config_class: type[Section]) -> str:
    """Explain one of pydantic's errors: what is wrong and how to fix it."""
    kind, context, got = error["type"], error.get("ctx", {}), _shown(error["input"])
    match kind:
        case "impossible":
            return str(context["sentence"])
        case "extra_forbidden":
            return f"unknown key{_suggestion(error['loc'], key, config_class)}"
        case "missing" if isinstance(error["loc"][-1], int):
            return f"has too few values, got {got}; add the missing ones"
        case "missing":
            return "required but missing; set it in the file or on the command line"
        case "literal_error":
            return _wrong_choice(context["expected"], error["input"])
        case "union_tag_invalid":
            return _wrong_choice(" or ".join(context["expected_tags"].rsplit(", ", 1)), context["tag"])
        case "bool_type":
            word = BOOLEAN_WORDS.get(str(error["input"]).lower(), "one of them")
            return f"must be true or false, got {got}; write {word}"
        case "int_type" | "int_from_float":
            return f"must be a whole number, got {got}; write digits only"
        case "float_type" | "float_parsing":
            return f"must be a number, got {got}; write it like 0.5 or 1e-4"
        case "model_type" | "model_attributes_type":
            return f"must be a section, got {got}; write its keys below it"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            comparison = kind.replace("_than", " than").replace("_equal", " or equal to")
            fix = "increase it" if kind.startswith("greater") else "lower it"
            return f"must be {comparison} {next(iter(context.values())):g}, got {got}; {fix}"
        case "too_short" | "too_long":
            fix = "add the missing ones" if kind == "too_short" else "remove the others"
            return f"must have {context.get('min_length', context.get('max_length'))} values, got {got}; {fix}"
        case "path_type" | "string_type":
            return f"must be text, got {got}; put it in quotes"
        case "tuple_type" | "list_type":
            return f"must be a list, got {got}; write it as [a, b]"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {got}; correct the value"


def _wrong_choice(expected: str, value: Any) -> str:
    choices = re.findall(r"[\w.-]+", expected.replace(" or ", " "))
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    fix = f"did you mean {near[0]}?" if near else "choose one of these"
    return f"must be {expected.replace(chr(39), '')}, got {_shown(value)}; {fix}"


def _suggestion(location: Key, key: Key, config_class: type[Section]) -> str:
    """Return the likely fix for an unknown key: a similar key of this section, or the same key in another section."""
    word = SYNONYMS.get(str(key[-1]), str(key[-1]))
    here = [name for section in sections_at(config_class, location[:-1]) for name in section.model_fields]
    others = {
        name: union_name(section) for section in sections_at(config_class, key[:-1]) for name in section.model_fields
    }
    everywhere = {str(leaf[-1]): dotted(leaf) for leaf, _ in leaves(config_class)}
    if word in here:
        return f"; did you mean {word}?"
    if word in everywhere and word not in others:
        return f"; did you mean {everywhere[word]}?"
    if near := difflib.get_close_matches(word, [*here, *others], n=1):
        other = "" if near[0] in here else f", which requires {dotted((*key[:-1], 'name'))}={others[near[0]]}"
        return f"; did you mean {near[0]}{other}?"
    if near := difflib.get_close_matches(word, list(everywhere), n=1, cutoff=0.75):
        return f"; did you mean {everywhere[near[0]]}?"
    return f"; the valid keys are {', '.join(here)}" if here else "; remove it"


def _delete(values: Any, key: Key) -> None:
    """Remove the value at `key` from nested dicts, if it exists."""
    *above, name = key
    for part in above:
        values = values[part] if isinstance(values, dict) and part in values else None
    if isinstance(values, dict):
        values.pop(name, None)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
