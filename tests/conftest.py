"""Fixtures for all tests: no GPU unless it is asked for, no network, shards of the digits, a tiny recipe, a shell."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

if os.environ.get("VITRAIL_GPU_TESTS") != "1":  # with it, `pytest -m gpu` runs the tests that need one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # after OMP_NUM_THREADS is set

from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from tests.support.launching import ROOT, TINY, Shell, Vitrail, run_vitrail
from tests.support.ranks import RankServer, Seen, folder_of
from tests.support.shared import once
from tests.support.training import IN_MLFLOW, KILLED_IN_SAVE, Trained, needs

# A shell makes background jobs (started with &) ignore SIGINT, and their children inherit this; restore the default.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("patient", deadline=None)  # a busy machine must not fail a test
settings.load_profile("patient")


START_PROCESSES = {"shell", "tool", "vitrail", "trained", "run_poisoned", "fine_tuned"}  # fixtures
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}  # audit events
LONGEST = ("test_restarts", "test_stages", "test_zero_stages", "test_compiled", "test_two_nodes")
LONGEST += ("test_health", "test_other_topology", "test_exit_codes", "test_tracker", "test_remote_dataset")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes, and skip those that need a GPU where there is none.

    The longest files come first, so that no worker is left alone with them.
    """
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if START_PROCESSES & {*getattr(item, "fixturenames", ())}:
            item.add_marker("processes")
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let only the tests that are marked with `processes` start any, so that `make check` stays fast."""
    may_start_processes[0] = item.get_closest_marker("processes") is not None
    try:
        return (yield)
    finally:
        may_start_processes[0] = True


may_start_processes = [True]


def refuse_processes(event: str, details: tuple[object, ...]) -> None:
    if event in STARTS and not may_start_processes[0] and details[:1] != ("git",):
        raise RuntimeError("this test starts a process; mark it with @pytest.mark.processes")


sys.addaudithook(refuse_processes)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Restore the handlers that a test or a training function has installed: forked processes would inherit them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell in a folder that is not the project's."""
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what all workers of pytest share; see `once`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def digits(session_folder: Path) -> Path:
    """Shards of the digits 0 to 2: 8 or more small ones, and a validation split that no batch size divides."""
    source = keep_classes(list_digits(), ["0", "1", "2"])
    recipe = ShardOptions(validation_fraction=0.1, shard_bytes=50_000, seed=0)
    return once(session_folder / "digits", lambda out: make_shards(source, out, recipe))


@pytest.fixture(scope="session")
def empty_store(session_folder: Path) -> Path:
    """An MLflow store without runs: creating one takes seconds, copying it does not."""
    from mlflow import MlflowClient  # takes seconds, and few tests need it

    return once(session_folder / "mlflow.db", lambda path: MlflowClient(f"sqlite:///{path}"))


@pytest.fixture
def stores(tmp_path: Path, empty_store: Path) -> None:
    """Put an MLflow store where the runs of a test look for it, so that they need not create it."""
    for folder in (tmp_path, tmp_path / "runs"):
        folder.mkdir(exist_ok=True)
        shutil.copy(empty_store, folder / "mlflow.db")


@pytest.fixture
def tiny(tmp_path: Path, digits: Path) -> Path:
    """A pretraining recipe that takes seconds, with its run folder next to it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(run_dir=tmp_path / "runs" / "tiny", shards=digits))
    return path


@pytest.fixture(scope="session")
def trained(digits: Path, session_folder: Path, request: pytest.FixtureRequest) -> Iterator[Trained]:
    """What the main rank of a run of `ranks_train.py` has seen, by the run's world size and name.

    Each run is trained when a test first asks for it.
    """
    root = session_folder / "ranks_train"
    root.mkdir(exist_ok=True)
    recipe = TINY.format(run_dir="unused", shards=digits)
    once(root / "tiny.yaml", lambda path: path.write_text(recipe))
    server = RankServer(ROOT / "tests" / "pretrain" / "ranks_train.py", root)

    def train(world_size: int, name: str) -> Seen:
        if (world_size, name) == IN_MLFLOW:
            folder, empty_store = folder_of(root, world_size, name), request.getfixturevalue("empty_store")
            folder.mkdir(parents=True, exist_ok=True)
            once(folder / "mlflow.db", partial(shutil.copy, empty_store))
        for size, source in needs(world_size, name):
            train(size, source)
        return server.run(name, world_size, fails=name == KILLED_IN_SAVE)

    yield train
    server.close()


@pytest.fixture
def vitrail() -> Vitrail:
    """The `vitrail` command, run in this process."""
    return run_vitrail


@pytest.fixture
def tool() -> Callable[[str], str]:
    """The path of a command of this environment, by its name."""
    return lambda name: str(Path(sys.executable).parent / name)
