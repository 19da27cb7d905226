"""Runs of `ranks_train.py`, each when a test first asks for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launching import ROOT, TINY
from tests.support.ranks import RankServer, Seen
from tests.support.shared import once
from tests.support.training import KILLED_IN_SAVE, Trained, needs


@pytest.fixture(scope="session")
def trained(digits: Path, session_folder: Path) -> Iterator[Trained]:
    """What the main rank of a run has seen, by the run's world size and name."""
    root = session_folder / "ranks_train"
    root.mkdir(exist_ok=True)
    recipe = TINY.format(run_dir="unused", shards=digits)
    once(root / "tiny.yaml", lambda path: path.write_text(recipe))
    server = RankServer(ROOT / "tests" / "pretrain" / "ranks_train.py", root)

    def train(world_size: int, name: str) -> Seen:
        for size, source in needs(world_size, name):
            train(size, source)
        return server.run(name, world_size, fails=name == KILLED_IN_SAVE)

    yield train
    server.close()
