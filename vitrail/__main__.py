"""The `vitrail` command, also as `python -m vitrail`."""

import sys
from importlib import import_module

from vitrail.shadowing import check_packages


def main() -> None:
    """Run the command line, unless a module of the user's own hides one of our packages."""
    try:
        check_packages()
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    import_module("launch.cli").main()


if __name__ == "__main__":
    main()
