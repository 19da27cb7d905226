"""Runs of `ranks_train.py`, each when a test first asks for it."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.launching import ROOT, TINY
from tests.support.ranks import RankServer, Seen, folder_of
from tests.support.shared import once
from tests.support.training import IN_MLFLOW, KILLED_IN_SAVE, Trained, needs


@pytest.fixture(scope="session")
def trained(digits: Path, session_folder: Path, request: pytest.FixtureRequest) -> Iterator[Trained]:
    """What the main rank of a run has seen, by the run's world size and name."""
    root = session_folder / "ranks_train"
    root.mkdir(exist_ok=True)
    recipe = TINY.format(run_dir="unused", shards=digits)
    once(root / "tiny.yaml", lambda path: path.write_text(recipe))
    server = RankServer(ROOT / "tests" / "pretrain" / "ranks_train.py", root)

    def train(world_size: int, name: str) -> Seen:
        if name == IN_MLFLOW:
            folder, empty_store = folder_of(root, world_size, name), request.getfixturevalue("empty_store")
            folder.mkdir(parents=True, exist_ok=True)
            once(folder / "mlflow.db", partial(shutil.copy, empty_store))
        for size, source in needs(world_size, name):
            train(size, source)
        return server.run(name, world_size, fails=name == KILLED_IN_SAVE)

    yield train
    server.close()
