"""Which package may import which, and what stays light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pretrain", "finetune", "launch", "vitrail")

# Package or module -> what it may import of ours; docs/imports.md is generated from this table.
LEAVES = {
    "pretrain.captions",
    "pretrain.config",
    "pretrain.cores",
    "pretrain.errors",
    "pretrain.files",
    "pretrain.journal",
}
MAY_IMPORT = {
    "pretrain": set(),
    "pretrain.averaging": set(),
    "pretrain.captions": set(),
    "pretrain.cores": set(),
    "pretrain.device_copies": set(),
    "pretrain.errors": set(),
    "pretrain.files": set(),
    "pretrain.journal": {"pretrain.errors", "pretrain.files"},
    "pretrain.outcome": {"pretrain.errors"},
    "pretrain.config": set(),
    "pretrain.card": {"pretrain", "pretrain.config"},
    "pretrain.rank_variables": {"pretrain.errors"},
    "pretrain.configfile": {"pretrain.config", "pretrain.errors", "pretrain.outcome", "pretrain.rank_variables"},
    "pretrain.schedules": set(),
    "pretrain.stop_signal": set(),
    "pretrain.distributed": {"pretrain.errors"},
    "pretrain.delayed_flag": {"pretrain.device_copies", "pretrain.distributed"},
    "pretrain.startup": {"pretrain.cores", "pretrain.distributed", "pretrain.errors"},
    "pretrain.state": set(),
    "pretrain.hub": {"pretrain.errors"},
    "pretrain.metrics": set(),
    "pretrain.data": LEAVES,
    "pretrain.model": LEAVES,
    "pretrain.tracking": LEAVES,
    "pretrain.optimizers": {
        "pretrain.averaging",
        "pretrain.config",
        "pretrain.device_copies",
        "pretrain.distributed",
    },
    "pretrain.objectives": {
        "pretrain.averaging",
        "pretrain.config",
        "pretrain.errors",
        "pretrain.model",
        "pretrain.distributed",
        "pretrain.data.transforms",
    },
    "pretrain.heartbeat": {"pretrain.outcome"},
    "pretrain.health": {"pretrain.config", "pretrain.device_copies", "pretrain.distributed", "pretrain.journal"},
    "pretrain.engine": {
        "pretrain.averaging",
        "pretrain.config",
        "pretrain.distributed",
        "pretrain.errors",
        "pretrain.optimizers",
        "pretrain.startup",
    },
    "pretrain.checkpoint": LEAVES
    | {"pretrain.engine", "pretrain.distributed", "pretrain.hub", "pretrain.model", "pretrain.state"},
    "pretrain.export": LEAVES
    | {"pretrain.card", "pretrain.checkpoint", "pretrain.model", "pretrain.data.transforms", "pretrain.tracking"},
    "pretrain.indexing": LEAVES | {"pretrain.data", "pretrain.distributed", "pretrain.tracking"},
    "pretrain.run_folder": LEAVES | {"pretrain.checkpoint", "pretrain.distributed", "pretrain.heartbeat"},
    "pretrain.environment": {"pretrain.errors"},
    "pretrain.device_errors": {"pretrain.errors"},
    "pretrain.machine": {"pretrain.data", "pretrain.distributed"},
    "pretrain.run": LEAVES
    | {
        "pretrain.engine",
        "pretrain.environment",
        "pretrain.checkpoint",
        "pretrain.health",
        "pretrain.heartbeat",
        "pretrain.objectives",
        "pretrain.model",
        "pretrain.data",
        "pretrain.tracking",
        "pretrain.distributed",
        "pretrain.indexing",
        "pretrain.machine",
        "pretrain.run_folder",
        "pretrain.state",
    },
    "pretrain.interval": {"pretrain.config", "pretrain.data", "pretrain.device_copies", "pretrain.distributed"},
    "pretrain.steps": LEAVES
    | {
        "pretrain.data",
        "pretrain.heartbeat",
        "pretrain.objectives",
        "pretrain.schedules",
        "pretrain.distributed",
        "pretrain.state",
    },
    "pretrain.evaluation": LEAVES
    | {
        "pretrain.metrics",
        "pretrain.data",
        "pretrain.delayed_flag",
        "pretrain.engine",
        "pretrain.heartbeat",
        "pretrain.objectives",
        "pretrain.tracking",
        "pretrain.distributed",
    },
    "pretrain.messages": {
        "pretrain.config",
        "pretrain.objectives",
        "pretrain.run",
        "pretrain.tracking",
        "pretrain.distributed",
    },
    "pretrain.train": LEAVES
    | {
        "pretrain.objectives",
        "pretrain.messages",
        "pretrain.evaluation",
        "pretrain.configfile",
        "pretrain.interval",
        "pretrain.run",
        "pretrain.steps",
        "pretrain.stop_signal",
        "pretrain.engine",
        "pretrain.checkpoint",
        "pretrain.device_errors",
        "pretrain.health",
        "pretrain.outcome",
        "pretrain.data",
        "pretrain.startup",
        "pretrain.tracking",
        "pretrain.schedules",
        "pretrain.distributed",
    },
    "finetune": LEAVES
    | {
        "pretrain.card",
        "pretrain.configfile",
        "pretrain.outcome",
        "pretrain.tracking",
        "pretrain.data",
        "pretrain.delayed_flag",
        "pretrain.device_errors",
        "pretrain.distributed",
        "pretrain.environment",
        "pretrain.heartbeat",
        "pretrain.hub",
        "pretrain.indexing",
        "pretrain.interval",
        "pretrain.machine",
        "pretrain.optimizers",
        "pretrain.run_folder",
        "pretrain.schedules",
        "pretrain.startup",
        "pretrain.stop_signal",
    },
    "launch": {"pretrain", "finetune"},
    "vitrail": {
        "finetune",
        "pretrain",
        "pretrain.checkpoint",
        "pretrain.config",
        "pretrain.data",
        "pretrain.distributed",
        "pretrain.errors",
        "pretrain.export",
        "pretrain.hub",
        "pretrain.model",
    },
}
ONLY_THERE = {
    "deepspeed": ("pretrain/engine/deepspeed.py",),
    "transformers": ("pretrain/export/", "finetune/"),
    "mlflow": ("pretrain/tracking/",),
    "accelerate": ("finetune/",),
}
HEAVY = ("torch", "deepspeed", "transformers", "mlflow", "accelerate", "sklearn")


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the imported modules of a file, and whether each stands inside a function."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / full.replace(".", "/")).is_dir() or (ROOT / f"{full.replace('.', '/')}.py").exists()
                found.append((full if is_module else str(node.module), id(node) in inside))
    return found


def covers(row: str, module: str) -> bool:
    """Return whether a module belongs to a row of the table; `pretrain` alone is the file of the package itself."""
    return module == row or (row != "pretrain" and module.startswith(row + "."))


def row_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return max((row for row in MAY_IMPORT if covers(row, name)), key=len)


@pytest.mark.parametrize("row", MAY_IMPORT)
def test_every_row_lists_only_what_is_imported(row: str) -> None:
    imported = {module for path in modules() if row_of(path) == row for module, _ in imports(path)}
    listed = MAY_IMPORT[row] - (LEAVES if MAY_IMPORT[row] >= LEAVES else set())
    unused = [other for other in listed if not any(covers(other, module) for module in imported)]
    assert not unused, f"{row} no longer imports {unused}; remove it from MAY_IMPORT"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_what_they_may(path: Path) -> None:
    row = row_of(path)
    for module, in_function in imports(path):
        if module.partition(".")[0] not in PACKAGES:
            continue
        is_verb = (
            path.parent == ROOT / "launch" / "commands"
        )  # a verb imports its stage when it runs: --help stays quick
        assert is_verb or not in_function, f"{module} is imported inside a function"
        allowed = covers(row, module) or any(covers(other, module) for other in MAY_IMPORT[row])
        if row == "launch":
            allowed = module.partition(".")[0] in PACKAGES
        assert allowed, f"{row} may not import {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_are_imported_only_in_their_packages(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for module, _ in imports(path):
        homes = ONLY_THERE.get(module.partition(".")[0])
        assert homes is None or name.startswith(homes), f"{module} belongs in {homes}"


@pytest.mark.processes
@pytest.mark.parametrize(
    "module",
    [
        "launch.cli",
        "pretrain.configfile",
        "finetune.config",
        "vitrail",
        "pretrain.data.shards.make",
        "pretrain.data.shards.scan",
        "pretrain.data.shards.first_use",
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.processes
def test_training_does_not_import_mlflow_and_leaves_it_importable() -> None:
    code = "import sys, pretrain.train; print('mlflow' in sys.modules); import mlflow; print(mlflow.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "mlflow"]


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_test_imports_another_test_and_no_benchmark_imports_tests(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for module in re.findall(r"\b(?:from|import) (tests\b[\w.]*)", path.read_text()):
            assert folder == "tests", f"{path} imports {module}"
            assert module.startswith("tests.support"), f"{path} imports {module}; move what it needs to tests/support"


def test_no_package_has_a_name_that_says_nothing() -> None:
    forbidden = {"utils", "common", "core", "helpers", "hooks", "callbacks", "base_trainer", "misc"}
    assert not forbidden & {part for path in modules() for part in path.relative_to(ROOT).with_suffix("").parts}
