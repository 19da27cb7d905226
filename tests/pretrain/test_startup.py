"""The limits of a rank, and the meeting of all ranks, of which some never come."""

import os
import re
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import finetune.train
import pretrain.train
from finetune.config import FinetuneConfig
from pretrain import startup
from pretrain.config import PretrainConfig
from pretrain.configfile import CommandLine, load_config
from pretrain.errors import StartupError
from pretrain.startup import describe_ranks, join_process_group, prepare_process
from tests.support.launching import ROOT, free_port
from tests.support.runs import FINETUNE_YAML


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], str]:
    """A function that makes this process one of several ranks, and returns the port of rank 0."""

    def set_variables(rank: int, world_size: int) -> str:
        port = free_port()
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        for name, value in {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        return port

    return set_variables


def stop_after(polls: int) -> Callable[[], bool]:
    """Return a function that asks to stop when it is called for that many times."""
    calls: list[None] = []
    return lambda: calls.append(None) or len(calls) >= polls  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 2], "ranks 0, 2"), ([1, 2, 3, 7, 9, 10], "ranks 1 to 3, 7, 9 to 10")]
)
def test_ranks_are_named_by_ranges(ranks: list[int], text: str) -> None:
    assert describe_ranks(ranks) == text


def test_missing_ranks_are_named_until_the_run_must_stop(
    as_rank: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = as_rank(0, 4)
    monkeypatch.setattr(startup, "REPORT_SECONDS", 0.3)
    assert not join_process_group(stop_after(15))
    lines = capsys.readouterr().err.splitlines()
    whom = f"ranks 1 to 3 of 4 (rank 0 is at 127.0.0.1:{port})"
    assert lines[0] == f"rank 0: waiting for {whom} (0 s so far)"
    assert lines[-1] == f"rank 0: stopped while waiting for {whom}"
    assert 2 < len(lines) < 5  # every report comes after twice the time
    guide = (ROOT / "docs" / "cluster.md").read_text()
    [example] = re.findall(r"^ *(rank 0: waiting for ranks .*)$", guide, re.MULTILINE)
    printed = lines[0].replace(f"127.0.0.1:{port}", "gpu-node-01:29500")
    assert re.sub(r"\d+", "1", example) == re.sub(r"\d+", "1", printed)


def test_the_wait_has_a_limit(as_rank: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    port = as_rank(1, 2)
    monkeypatch.setattr(startup, "LIMIT_SECONDS", 0.3)
    problem = (
        rf"^rank 1: gave up after 0 s of waiting for rank 0 of 2 \(rank 0 is at 127\.0\.0\.1:{port}\): .*refused; "
    )
    with pytest.raises(StartupError, match=problem):
        join_process_group()


def test_a_taken_port_is_named(as_rank: Callable[[int, int], str]) -> None:
    port = as_rank(0, 2)
    problem = rf"^MASTER_PORT={port}: another program on \S+ uses this port; .* --master_port "
    with socket.create_server(("127.0.0.1", int(port))), pytest.raises(StartupError, match=problem):
        join_process_group()


def test_the_end_of_rank_0_ends_the_wait_of_others(as_rank: Callable[[int, int], str]) -> None:
    port = as_rank(1, 3)
    servers = [TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)]
    stop = stop_after(5)

    def end_rank_0() -> bool:
        if stop():
            servers.clear()
        return False

    with pytest.raises(StartupError, match=rf"^rank 1: rank 0 at 127\.0\.0\.1:{port} has ended .*; see its output"):
        join_process_group(end_rank_0)


def test_a_rank_without_a_gpu_is_an_error(as_rank: Callable[[int, int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(3, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(StartupError, match=r"^rank 3: LOCAL_RANK is 3, but \S+ has 2 GPUs; start one rank per GPU"):
        join_process_group()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_signal_ends_the_wait(
    stage: str,
    number: signal.Signals,
    as_rank: Callable[[int, int], str],
    tiny: Path,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    as_rank(1, 2)
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text(FINETUNE_YAML.format(folder=tmp_path, digits=digits))
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    if stage == "pretrain":
        assert pretrain.train.main(CommandLine(load_config(PretrainConfig, tiny, []).config, "", False)) == 75
    else:
        assert finetune.train.main(CommandLine(load_config(FinetuneConfig, recipe, []).config, "", False)) == 130
    assert capsys.readouterr().err.startswith("rank 1: stopped while waiting for rank 0 of 2")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def file_limit() -> Iterator[int]:
    """A low soft limit of open files; the hard limit, which it may be raised to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_limit_of_open_files_is_raised(file_limit: int) -> None:
    prepare_process()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(file_limit, 65_536), file_limit)


def test_a_process_without_a_home_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", no_home)
    prepare_process()
    assert Path(os.environ["HOME"]).is_dir()


@pytest.mark.parametrize(("ranks", "threads"), [("1", 6), ("4", 1), ("9", 1)])
def test_ranks_share_the_cores(ranks: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(startup, "available_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    prepare_process()
    assert chosen == []  # the user, or the launcher, has set OMP_NUM_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    prepare_process()
    assert chosen == [threads]
    assert os.environ["OMP_NUM_THREADS"] == str(threads)


def test_waiting_threads_do_not_spin() -> None:
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
