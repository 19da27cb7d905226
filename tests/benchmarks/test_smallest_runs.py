"""Every benchmark starts, parses its smallest run's arguments, and is listed in benchmarks/README.md."""

import re
import shlex
import sys

import pytest

from tests.support.launching import ROOT, Shell

SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())
README = (ROOT / "benchmarks" / "README.md").read_text()
SMALLEST = dict(re.findall(r"^\| `(\w+\.py)` \|.*?`(python .*?)` \|", README, re.MULTILINE))

# Runs each script until it has parsed its arguments: an option that does not exist ends it with an error.
PARSE_EACH = """
import argparse, runpy, sys
class Parsed(Exception): pass
parse = argparse.ArgumentParser.parse_args
def stop(parser, *arguments): raise Parsed(vars(parse(parser, *arguments)))
argparse.ArgumentParser.parse_args = stop
for command in sys.argv[1:]:
    sys.argv = command.split("\\x1f")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Parsed as parsed:
        print(sys.argv[0], parsed)
"""


def test_the_readme_lists_every_benchmark_with_a_smallest_run() -> None:
    assert [*SMALLEST] == [path.name for path in SCRIPTS]


@pytest.mark.processes
def test_every_benchmark_accepts_the_arguments_of_its_smallest_run(shell: Shell) -> None:
    commands = [shlex.split(command)[1:] for command in SMALLEST.values() if "--help" not in command]
    joined = ["\x1f".join([str(ROOT / script), *arguments]) for script, *arguments in commands]
    done = shell([sys.executable, "-c", PARSE_EACH, *joined])
    assert done.code == 0, done.err[-3000:]
    for script, *arguments in commands:
        [line] = [line for line in done.out.splitlines() if line.startswith(f"{ROOT / script} ")]
        for option in (each for each in arguments if each.startswith("--")):
            assert f"'{option[2:].replace('-', '_')}'" in line, option
