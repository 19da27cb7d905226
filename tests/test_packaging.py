"""A wheel contains every package of the tree, and the files to copy for a cluster."""

import ast
import re
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_named() -> None:
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed  # read as Python's, since 3.10 has no tomllib
    folders = [path.parent for top in ("finetune", "launch", "pretrain") for path in (ROOT / top).rglob("__init__.py")]
    packages = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert ast.literal_eval(listed[1]) == sorted([*packages, "launch.recipes"])  # a folder of YAML files


def test_recipes_and_files_for_a_cluster_are_in_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    wheel = Distribution()
    wheel.parse_config_files(["pyproject.toml"])
    wheel.include_package_data = False  # it would look for files of git, which an archive of the project lacks
    build = wheel.get_command_obj("build_py")
    build.ensure_finalized()
    files = {Path(folder) / name for _, folder, _, names in build.data_files for name in names}
    copied = [*(ROOT / "launch" / "cluster").iterdir(), *(ROOT / "configs").rglob("*.yaml")]
    assert {path.relative_to(ROOT) for path in copied} <= files
