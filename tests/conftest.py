"""What many tests need: no GPU, no network, shards of the digits, a tiny recipe, a shell."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from tests.support.launching import TINY, Shell

signal.signal(signal.SIGINT, signal.default_int_handler)  # started with &, a shell has it ignored, here and in children

settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")


LONGEST = ("test_launchers", "test_train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, or one worker would be left alone with them."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell in a foreign directory."""
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the digits 0 to 2: 8 or more small ones, and a validation split that no batch size divides."""
    out = tmp_path_factory.mktemp("data") / "digits"
    source = keep_classes(list_digits(), ["0", "1", "2"])
    make_shards(source, out, ShardOptions(validation_fraction=0.1, shard_bytes=50_000, seed=0))
    return out


@pytest.fixture
def tiny(tmp_path: Path, digits: Path) -> Path:
    """A pretraining recipe of seconds, its run folder beside it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(run_dir=tmp_path / "runs" / "tiny", shards=digits))
    return path


@pytest.fixture
def tool() -> Callable[[str], str]:
    """Find a command of this environment."""
    return lambda name: str(Path(sys.executable).parent / name)
