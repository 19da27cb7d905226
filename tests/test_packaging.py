"""A wheel contains every package and the files to copy, and an editable install finds the packages from any folder."""

import ast
import re
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("finetune", "launch", "pretrain", "vitrail")


def test_every_package_is_named() -> None:
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed  # read as Python's, since 3.10 has no tomllib
    folders = [path.parent for top in PACKAGES for path in (ROOT / top).rglob("__init__.py")]
    assert ast.literal_eval(listed[1]) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def test_recipes_and_files_for_a_cluster_are_in_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    wheel = Distribution()
    wheel.parse_config_files(["pyproject.toml"])
    wheel.include_package_data = False  # it would look for files of git, which an archive of the project lacks
    build = wheel.get_command_obj("build_py")
    build.ensure_finalized()
    files = {Path(folder) / name for _, folder, _, names in build.data_files for name in names}
    launch = ROOT / "launch"
    recipes = [launch / "recipes" / path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")]
    copied = [launch / "accelerate.yaml", *(launch / "cluster").iterdir(), *recipes]
    assert {path.relative_to(ROOT) for path in copied} <= files
