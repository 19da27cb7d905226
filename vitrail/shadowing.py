"""Find modules of the user's own that hide the packages of Vitrail: a script called pretrain.py is a common one."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("finetune", "launch", "pretrain")


def check_packages() -> None:
    """Check that Python finds the packages of Vitrail, before any of them is imported.

    Raises:
        ImportError: If it finds another module of the same name first, or none.
    """
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None:
            raise ImportError(f"{ROOT / name}: this package of Vitrail is not found; install vitrail again")
        found = spec.origin or next(iter(spec.submodule_search_locations or [name]))  # a package without code
        if Path(found).resolve() != ROOT / name / "__init__.py":
            raise ImportError(
                f"{found}: hides the package `{name}` of Vitrail; rename it, or start Python in another folder"
            )
