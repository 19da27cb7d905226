"""The `vitrail` command: quick help, the version, errors in one sentence."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

import pretrain
from launch.cli import app
from pretrain.data.storage.index import DatasetInfo
from tests.support.launching import ROOT, Shell, Vitrail

HEAVY = ("torch", "numpy", "transformers", "deepspeed", "mlflow", "yaml")


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the parser of a command and of all its subcommands."""
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


COMMANDS = dict(commands(typer.main.get_command(app)))
VERBS = {words: command for words, command in COMMANDS.items() if not hasattr(command, "commands")}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(words: tuple[str, ...], tool: Callable[[str], str]) -> None:
    command = [sys.executable, "-X", "importtime", tool("vitrail"), *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"\|\s+typer\b", done.stderr)
    assert not re.search(rf"\|\s+({'|'.join(HEAVY)})\b", done.stderr)
    assert " ".join(("Usage: vitrail", *words)) in done.stdout


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_help_describes_every_parameter_and_gives_examples(words: tuple[str, ...]) -> None:
    command = VERBS[words]
    for parameter in command.params:
        text = getattr(parameter, "help", None)
        assert text and text.endswith("."), f"{parameter.name}: {text!r} is not a sentence"
    examples = [line.removeprefix("Example: ") for line in command.help.splitlines() if line.startswith("Example: ")]
    assert examples
    for example in examples:
        program, *arguments = shlex.split(example)
        assert (program, *arguments[: len(words)]) == ("vitrail", *words)
        command.make_context(" ".join(words), arguments[len(words) :])  # raises if the example does not parse


def test_version_is_that_of_the_package(shell: Shell, tool: Callable[[str], str]) -> None:
    done = shell([tool("vitrail"), "--version"])
    assert (done.code, done.out) == (0, f"vitrail {pretrain.__version__}\n")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = { attr = "pretrain.__version__" }' in pyproject


def test_make_and_index_shards_of_a_folder(tmp_path: Path, shell: Shell, tool: Callable[[str], str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / "in" / name / f"{i}.png")
    (tmp_path / "in" / "cat" / "bad.png").write_text("not an image")
    make = [tool("vitrail"), "shards", "make", "in", "out", "--validation", "0.3"]
    refused = shell(make)
    assert refused.code == 2
    assert "1 unreadable file:\n  cat/bad.png: not an image of a known format" in refused.err
    done = shell([*make, "--skip-bad"])
    assert done.code == 0
    assert "writing shards" in done.err
    assert "21/21" in done.err
    assert "left out: cat/bad.png: not an image of a known format" in done.out
    assert "out/train: 15 images in 2 classes, 1 shard, 0.0 MB" in done.out
    dataset = (tmp_path / "out" / "train" / "dataset.json").read_bytes()
    (tmp_path / "out" / "train" / "dataset.json").unlink()
    indexed = shell([tool("vitrail"), "shards", "index", "out/train"])
    assert indexed.code == 0, indexed.err
    assert (tmp_path / "out" / "train" / "dataset.json").read_bytes() == dataset
    (tmp_path / "classes.txt").write_text("kitten\npuppy\n")
    renamed = shell([tool("vitrail"), "shards", "index", "out/train", "--class-names", "classes.txt"])
    assert renamed.code == 0, renamed.err
    assert DatasetInfo.load(tmp_path / "out" / "train").class_names == ["kitten", "puppy"]
    (tmp_path / "out" / "train" / "more.tar.gz").touch()
    refused = shell([tool("vitrail"), "shards", "index", "out/train"])
    assert refused.code == 2
    assert "1 compressed tars, the first is more.tar.gz" in refused.err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (
            ["shards", "make", "nowhere", "out"],
            2,
            "nowhere: no such folder; name a folder, or `digits` for the built-in source",
        ),
        (["shards", "make", "digits", "out", "--shard-size", "big"], 2, "expected a size such as 256MB, got 'big'"),
        (["shards", "make", "digits", "out", "--classes", "ten"], 2, "no class ten; its classes are 0, 1, 2"),
        (["shards", "index", "."], 2, ".: no .tar files in this folder"),
        (["shards", "index", "nowhere"], 2, "nowhere: no such folder"),
        (["export", "nowhere", "out"], 2, "nowhere: no checkpoint here; expected a run folder"),
        (
            ["predict", "nowhere", str(ROOT / "docs" / "mae.png")],
            2,
            "nowhere: not a Hugging Face folder (config.json is missing)",
        ),
        (["shard"], 2, "No such command 'shard'"),
    ],
)
def test_user_errors_exit_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vitrail: Vitrail, arguments: list[str], code: int, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = vitrail(*arguments)
    assert done.code == code
    assert expected in done.err
