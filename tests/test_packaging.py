"""A wheel contains every package of the tree."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_named() -> None:
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed  # read as Python's, since 3.10 has no tomllib
    folders = [path.parent for top in ("finetune", "launch", "pretrain") for path in (ROOT / top).rglob("__init__.py")]
    packages = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert ast.literal_eval(listed[1]) == sorted([*packages, "launch.recipes"])  # a folder of YAML files
