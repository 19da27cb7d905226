"""Explain pydantic's errors: where the mistake is, what is wrong and how to fix it."""

import difflib
import json
import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pretrain.config.schema import Key, dotted, field_at, leaves, sections_at, union_name
from pretrain.config.section import Section
from pretrain.configfile.document import Document, Mistake, shown

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


def explain(document: Document, config_class: type[Section], error: ValidationError) -> list[Mistake]:
    """Return all mistakes, from reading and from validation, at most one per key.

    Args:
        document: Values that failed the validation.
        config_class: Class of the config.
        error: Result of the validation.
    """
    found = {mistake.key: mistake for mistake in document.mistakes}
    undecided = _add_mistakes(document, config_class, error, found)
    # Pydantic checks combinations only in sections without other errors: validate again without the wrong values.
    values = json.loads(json.dumps(document.values))
    for key in [key for key in found if key in document.places]:
        _delete(values, key[:-1] if key in undecided else key)
    try:
        config_class.model_validate_json(json.dumps(values))
    except ValidationError as second:
        _add_mistakes(document, config_class, second, found)
    return [mistake for mistake in document.mistakes if not mistake.key] + [found[key] for key in found if key]


def _add_mistakes(
    document: Document, config_class: type[Section], error: ValidationError, found: dict[Key, Mistake]
) -> set[Key]:
    """Add a mistake to `found` for each new key, and return keys `name` that select no alternative of a union."""
    undecided = set()
    details = [(_key(detail["loc"], document, config_class), detail) for detail in error.errors(include_url=False)]
    for place, detail in details:
        if detail["type"] == "string_type" and any(other[:-1] == place for other, _ in details):
            continue  # a list where text or a list may stand; one of its items is wrong
        key = (*place, "name") if detail["type"] == "union_tag_invalid" else place
        if key != place:
            undecided.add(key)
        section = key[: len(detail["loc"]) - 1]
        involved = {(*section, *name.split(".")) for name in detail.get("ctx", {}).get("keys", ())}
        if key not in found and not involved & found.keys():
            found[key] = Mistake(document.place(key), key, _sentence(detail, key, config_class))
    return undecided


def _key(location: Key, document: Document, config_class: type[Section]) -> Key:
    """Return the key of pydantic's location, which also contains the names of alternatives."""
    key: Key = ()
    for part in location:
        inside = (*key, part)
        if inside in document.places or field_at(config_class, inside):
            key = inside
    return key


def _sentence(error: ErrorDetails, key: Key, config_class: type[Section]) -> str:
    """Explain one of pydantic's errors: what is wrong and how to fix it."""
    kind, context, got = error["type"], error.get("ctx", {}), shown(error["input"])
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
    return f"must be {expected.replace(chr(39), '')}, got {shown(value)}; {fix}"


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
