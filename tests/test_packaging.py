"""A wheel contains every package of the tree, and an editable install finds them from any folder."""

import ast
import re
import shutil
import sys
import zipfile
from pathlib import Path

from tests.support.launching import Shell

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("finetune", "launch", "pretrain", "vitrail")


def test_every_package_is_named() -> None:
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed  # read as Python's, since 3.10 has no tomllib
    folders = [path.parent for top in PACKAGES for path in (ROOT / top).rglob("__init__.py")]
    assert ast.literal_eval(listed[1]) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def test_a_clone_called_vitrail_does_not_hide_the_package(tmp_path: Path, shell: Shell) -> None:
    """Python would take a folder `vitrail` in the current folder for a package without code, and find it first."""
    clone, site = tmp_path / "vitrail", tmp_path / "site"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    build = (
        f"import os; os.chdir({str(clone)!r}); import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"
    )
    built = shell([sys.executable, "-c", build])
    assert built.code == 0, built.err
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    use = f"import site; site.addsitedir({str(site)!r}); import vitrail; print(vitrail.__file__, vitrail.__version__)"
    used = shell([sys.executable, "-S", "-E", "-c", use])  # without the packages of the environment
    assert used.out.split() == [f"{clone}/vitrail/__init__.py", "0.1.0"], used.err
