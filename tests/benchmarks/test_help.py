"""Every benchmark still starts, and says what it does."""

import sys

from tests.support.launching import ROOT, Shell

HELP_OF_EACH = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, path
"""


def test_each_teaches(shell: Shell) -> None:
    scripts = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
    assert len(scripts) > 10
    done = shell([sys.executable, "-c", HELP_OF_EACH, *scripts])
    assert done.code == 0, done.err[-3000:]
    assert done.out.count("usage: ") == len(scripts)
    for path in scripts:
        assert f"usage: {path.name}" in done.out
