"""The language of docstrings and config descriptions, as far as a program can check it.

Entries of `Args:` and `Attributes:` and config descriptions are noun phrases or clauses with a subject. Every public
function, method and class has a docstring. Its `Raises:` lists every error that its own body raises, each with a clause
that begins with "If" or "When". Spelling is American. The project's former name is gone.
"""

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from finetune.config import FinetuneConfig
from pretrain.config import PretrainConfig, Section
from pretrain.config.schema import dotted, leaves

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    path for package in ("pretrain", "finetune", "launch", "vitrail") for path in sorted((ROOT / package).rglob("*.py"))
]
IDS = [str(path.relative_to(ROOT)) for path in FILES]

PREPOSITIONS = """about above across after against along alongside among around as at before behind below beneath beside
besides between beyond by despite down during except for from in inside into like near of off on onto out outside over
past per since than through throughout till to toward towards under until up upon via with within without"""
FRAGMENTS = "and as but how or so such that then what whatever when where which who whom whose why"
FORBIDDEN_STARTS = {*PREPOSITIONS.split(), *FRAGMENTS.split()}
DTYPES = {"bool", "float", "int", "uint8", "int32", "int64", "fp32", "fp64", "bf16", "float32", "float64"}

BRITISH = re.compile(
    r"\b(?:"
    r"(?:normal|optim|initial|serial|recogn|organ|synchron|standard|minim|maxim|summar|parallel|visual|categor|final"
    r"|general|local|quant|random|special|token|util|vector|regular|penal|equal|custom|real)is(?:e|es|ed|ing|er|ers|ation)"
    r"|(?:un)?labell(?:ed|ing)|modell(?:ed|ing)|signall(?:ed|ing)|travell(?:ed|ing)|fulfil|fulfils"
    r"|(?:colour|neighbour|behaviour|favour|honour)(?:s|ed|ing|less|hood|hoods|ful|able)?|gr" + "ey"
    r"|centr(?:e|es|ed|ing)|metres?|fibres?|analys(?:e|ed|ing)|artefacts?|catalogues?|licence|whilst|amongst|judgement"
    r")\b",
    re.IGNORECASE,
)

# Methods that override one of a class outside this project, which documents it.
OVERRIDES = {"forward", "step", "state_dict", "load_state_dict", "format_help", "emit"}
# These end the process on purpose and are no errors of the function.
EXITS = {"SystemExit", "Exit", "Abort"}


class Entry(NamedTuple):
    """One entry of a docstring's section."""

    line: int
    name: str
    text: str


Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def methods_by_class() -> dict[str, tuple[set[str], list[str]]]:
    """Return the methods and the names of the bases of every class of the packages, by the class's name."""
    found: dict[str, tuple[set[str], list[str]]] = {}
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                methods = {one.name for one in node.body if isinstance(one, Function)}
                bases = [name_of(base) for base in node.bases]
                known, known_bases = found.get(node.name, (set(), []))
                found[node.name] = (known | methods, [*known_bases, *bases])
    return found


def name_of(node: ast.expr) -> str:
    """Return the last part of a dotted name: `Exit` of `typer.Exit(1)`."""
    if isinstance(node, ast.Call):
        return name_of(node.func)
    if isinstance(node, ast.Subscript):
        return name_of(node.value)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def is_override(method: str, class_name: str) -> bool:
    """Return whether a base class, near or far, has the method too."""
    seen, bases = {class_name}, list(methods_by_class()[class_name][1])
    while bases:
        base = bases.pop()
        if base in seen or base not in methods_by_class():
            continue
        seen.add(base)
        methods, further = methods_by_class()[base]
        if method in methods:
            return True
        bases += further
    return method in OVERRIDES and bool(methods_by_class()[class_name][1])


def documented(path: Path) -> Iterator[tuple[Documented, ast.ClassDef | None]]:
    """Yield the functions, classes and methods of a module that are not nested in functions, with their class."""
    todo: list[tuple[ast.stmt, ast.ClassDef | None]] = [(node, None) for node in parse(path).body]
    while todo:
        node, owner = todo.pop(0)
        if isinstance(node, Function | ast.ClassDef):
            yield node, owner
        if isinstance(node, ast.ClassDef):
            todo += [(inner, node) for inner in node.body]
        elif isinstance(node, ast.If | ast.Try):
            todo += [(inner, owner) for inner in node.body]


def entries(node: Documented | ast.Module, section: str) -> list[Entry]:
    """Return the entries of one section of a docstring in Google's style."""
    docstring = ast.get_docstring(node, clean=True)
    if not docstring:
        return []
    lines, first = docstring.splitlines(), node.body[0].lineno
    found, inside = [], False
    for number, line in enumerate(lines):
        if re.fullmatch(r"[A-Z]\w+:", line):
            inside = line == f"{section}:"
        elif inside and (match := re.fullmatch(r" {4}(\*{0,2}[\w.]+)(?: \([^)]*\))?: *(.*)", line)):
            text = match[2] or (lines[number + 1].strip() if number + 1 < len(lines) else "")
            found.append(Entry(first + number, match[1], text))
    return found


def problem_of_raises(text: str) -> str | None:
    """Return what is wrong with the text of an entry under `Raises:`, or None."""
    return None if text.startswith(("If ", "When ")) else 'does not begin with "If" or "When"; say when it is raised'


def problem_of(text: str) -> str | None:
    """Return what is wrong with the beginning of an entry or a description, or None."""
    word = re.split(r"[^\w'-]", text, maxsplit=1)[0]
    if word.lower() in FORBIDDEN_STARTS:
        return f'begins with "{word}"; begin with a noun ("Number of ...") or with "Whether to ..."'
    if word[:1].islower() and word not in DTYPES:
        return f'begins with the lower-case word "{word}"; write a sentence or a noun phrase with a capital letter'
    return None if text else "is empty; describe it"


def raised(function: Function) -> dict[str, int]:
    """Return the classes of the errors that a function's own body raises, with their lines."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, caught: frozenset[str]) -> None:
        if isinstance(node, Function | ast.Lambda | ast.ClassDef):
            return
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = name_of(node.exc)
            if name[:1].isupper() and name not in caught | EXITS:
                found.setdefault(name, node.lineno)
        if isinstance(node, ast.Try):
            handled = {name_of(kind) for handler in node.handlers if handler.type for kind in kinds(handler.type)}
            for inner in node.body:
                visit(inner, caught | handled)
            rest = [*node.handlers, *node.orelse, *node.finalbody]
        else:
            rest = list(ast.iter_child_nodes(node))
        for inner in rest:
            visit(inner, caught)

    for statement in function.body:
        visit(statement, frozenset())
    return found


def kinds(handler: ast.expr) -> list[ast.expr]:
    """Return the classes of an `except` clause."""
    return list(handler.elts) if isinstance(handler, ast.Tuple) else [handler]


def is_verb(function: Function) -> bool:
    """Return whether Typer makes a command of a function, whose docstring then is a help text."""
    return any(name_of(decorator) in ("command", "callback") for decorator in function.decorator_list)


def is_public(node: Documented, owner: ast.ClassDef | None) -> bool:
    return not node.name.startswith("_") and not (owner and owner.name.startswith("_"))


def fail_on(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_entries_of_docstrings_are_whole_phrases(path: Path) -> None:
    name = path.relative_to(ROOT)
    fail_on(
        [
            f"{name}:{entry.line}: {section} entry `{entry.name}: {entry.text}` {problem}"
            for node, _ in documented(path)
            for section, check in (("Args", problem_of), ("Attributes", problem_of), ("Raises", problem_of_raises))
            for entry in entries(node, section)
            if (problem := check(entry.text))
        ]
    )


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_public_names_have_docstrings(path: Path) -> None:
    name = path.relative_to(ROOT)
    fail_on(
        [
            f"{name}:{node.lineno}: `{node.name}` has no docstring; say in one sentence what it does"
            for node, owner in documented(path)
            if is_public(node, owner)
            and not ast.get_docstring(node)
            and not (owner and is_override(node.name, owner.name))
            and "overload" not in [name_of(decorator) for decorator in node.decorator_list]
        ]
        + ([] if ast.get_docstring(parse(path)) else [f"{name}:1: the module has no docstring; say what it is for"])
    )


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_raised_errors_are_documented(path: Path) -> None:
    name, problems = path.relative_to(ROOT), []
    for node, owner in documented(path):
        if isinstance(node, ast.ClassDef) or is_verb(node):
            continue
        is_constructor = node.name == "__init__" and owner is not None
        if not is_constructor and (not is_public(node, owner) or not ast.get_docstring(node)):
            continue
        if is_constructor and owner and owner.name.startswith("_"):
            continue
        place = owner if is_constructor and owner else node
        listed = {entry.name.rpartition(".")[2] for entry in entries(place, "Raises")}
        problems += [
            f"{name}:{line}: `{place.name}` raises {error}, which its docstring does not list; add it under Raises:"
            for error, line in raised(node).items()
            if error not in listed
        ]
    fail_on(problems)


@pytest.mark.parametrize("config_class", [PretrainConfig, FinetuneConfig])
def test_config_descriptions_are_whole_phrases(config_class: type[Section]) -> None:
    problems = []
    for key, field in leaves(config_class):
        text = field.description or ""
        if problem := problem_of(text) or (None if text.endswith(".") else "has no period at its end"):
            problems.append(f"{dotted(key)}: description `{text}` {problem}")
    fail_on(problems)


def tracked_files() -> list[Path]:
    """Return the files of the repository, or everything below it where git does not know it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not {".venv", "runs", ".git"} & {*path.parts}]


@functools.cache
def texts() -> dict[str, str]:
    """Return the content of every text file of the repository by its name."""
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".cfg", ""}
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8", errors="ignore")
        for path in tracked_files()
        if path.suffix in suffixes
    }


def test_spelling_is_american() -> None:
    fail_on(
        [
            f'{name}:{number}: "{match[0]}" is British spelling; write it as Americans do'
            for name, text in texts().items()
            if name not in ("tests/test_language.py", "CHANGELOG.md")
            for number, line in enumerate(text.splitlines(), start=1)
            for match in BRITISH.finditer(line)
        ]
    )


def test_the_former_name_is_gone() -> None:
    former = re.compile("tess" + "era", re.IGNORECASE)
    problems = [
        f"{name}:{number}: contains the project's former name; write Vitrail"
        for name, text in texts().items()
        if name != "CHANGELOG.md"
        for number, line in enumerate(text.splitlines(), start=1)
        if former.search(line)
    ]
    fail_on(problems + [f"{name}: the file has the project's former name" for name in texts() if former.search(name)])
