"""Stacks as a heartbeat has them, made of functions that really exist in the installed packages and in this project."""

import ast
import sysconfig
from functools import cache
from pathlib import Path

from tests.support.launching import ROOT


def frames(*places: str) -> str:
    """Return a stack, the innermost frame last.

    Args:
        places: Functions as "path:name", or as "path:name:text" for the line of a function that contains a text. Paths
            are relative to the installed packages or to this project.
    """
    return "".join(_frame(*place.split(":", 2)) for place in places)


def find_file(path: str) -> Path:
    """Return a file of an installed package or of this project."""
    folders = ROOT, Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))
    return next(folder / path for folder in folders if (folder / path).exists())


@cache
def functions_in(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Return the first and the last line of each function of a file, by name."""
    found: dict[str, list[tuple[int, int]]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.setdefault(node.name, []).append((node.lineno, node.end_lineno or node.lineno))
    return found


def _frame(path: str, name: str, text: str = "") -> str:
    file = find_file(path)
    lines = file.read_text(encoding="utf-8").splitlines()
    numbers = [number for first, last in functions_in(file)[name] for number in range(first + 1, last + 1)]
    number = next(number for number in numbers if text in lines[number - 1])
    shown = lines[number - 1].strip() if text else "..."
    return f'  File "{file}", line {number}, in {name}\n    {shown}\n'
