"""What is left to train on is found out, and the command is changed to that and nothing else."""

import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_resource_filter

from launch.supervisor import resources as remains
from launch.supervisor.resources import adapt, list_gpus, list_lost_hosts, with_fewer_ranks

COMMAND = ["deepspeed", "--num_gpus", "4", "launch/pretrain.py"]


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that reaches every machine but node-2, and hangs for node-3; returns a hostfile."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\ncase "$*" in *node-2*) exit 255;; *node-3*) exec sleep 60;; esac\n')
    ssh.chmod(0o755)
    monkeypatch.setattr(remains, "SSH", (str(ssh), "-o", "BatchMode=yes"))
    monkeypatch.setattr(remains, "PROBE_SECONDS", 1.0)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# the machines\nnode-1 slots=8\nnode-2 slots=8\n\nnode-3 slots=4\n")
    return hostfile


def test_machines_that_do_not_answer_are_left_out(fake_ssh: Path) -> None:
    assert list_lost_hosts(fake_ssh) == ["node-2", "node-3"]
    said: list[str] = []
    command = adapt(["deepspeed", "--hostfile", str(fake_ssh), "launch/pretrain.py"], said.append, 0)
    assert command == ["deepspeed", "--exclude", "node-2@node-3", "--hostfile", str(fake_ssh), "launch/pretrain.py"]
    assert said == ["node-2, node-3: not reached by ssh; going on without"]
    pool = {"node-1": [0, 1], "node-2": [0, 1], "node-3": [0]}
    assert dict(parse_resource_filter(pool, exclude_str=command[2])) == {"node-1": [0, 1]}


def test_a_hostfile_that_is_missing_is_left_to_the_launcher(tmp_path: Path) -> None:
    command = ["deepspeed", "--hostfile", str(tmp_path / "missing"), "launch/pretrain.py"]
    assert adapt(command, print, 0) == command


def test_gpus_that_do_not_answer_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *count*) echo 4;; *" 1") exit 1;; esac\n')
    python.chmod(0o755)
    assert list_gpus(str(python)) == ([0, 2, 3], [1])
    monkeypatch.setattr(remains, "list_gpus", lambda: list_gpus(str(python)))
    said: list[str] = []
    command = adapt(COMMAND, said.append, 0)
    assert command == ["deepspeed", "--include", "localhost:0,2,3", "launch/pretrain.py"]
    assert said == ["GPU 1 does not answer; going on without"]
    pool = {"localhost": [0, 1, 2, 3]}
    assert parse_resource_filter(pool, include_str="localhost:0,2,3") == {"localhost": [0, 2, 3]}
    assert adapt(command, said.append, 0) == command  # once is enough


@pytest.mark.parametrize("counted", [([0, 1, 2, 3, 4], []), ([], [])], ids=["all", "none can be told"])
def test_a_command_for_which_nothing_is_lost_stays(
    monkeypatch: pytest.MonkeyPatch, counted: tuple[list[int], list[int]]
) -> None:
    monkeypatch.setattr(remains, "list_gpus", lambda: counted)
    assert adapt(COMMAND, print, 0) == COMMAND


def test_a_gpu_that_has_gone_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remains, "list_gpus", lambda: ([0, 1, 2], []))
    for command in (COMMAND, ["deepspeed", "--num_gpus=4", "launch/pretrain.py"]):
        assert adapt(command, print, 0) == ["deepspeed", "--include", "localhost:0,1,2", "launch/pretrain.py"]


DEEPSPEED, TORCHRUN = ["deepspeed", "launch/pretrain.py"], ["torchrun", "--nproc_per_node", "gpu", "launch/pretrain.py"]


def test_a_launcher_that_counts_the_gpus_itself_is_told_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remains, "list_gpus", lambda: ([0, 1, 3], [2]))
    assert adapt(DEEPSPEED, print, 4) == ["deepspeed", "--include", "localhost:0,1,3", "launch/pretrain.py"]
    assert adapt(DEEPSPEED, print, 0) == DEEPSPEED  # no rank has come so far that it could be counted


@pytest.mark.parametrize(
    ("command", "fewer"),
    [
        (COMMAND, ["deepspeed", "--num_gpus", "3", "launch/pretrain.py"]),
        (DEEPSPEED, ["deepspeed", "--num_gpus", "7", "launch/pretrain.py"]),
        (TORCHRUN, ["torchrun", "--nproc_per_node", "7", "launch/pretrain.py"]),
        (["torchrun", "--nproc-per-node=2", "x.py"], ["torchrun", "--nproc-per-node", "1", "x.py"]),
    ],
)
def test_one_rank_fewer(command: list[str], fewer: list[str]) -> None:
    said: list[str] = []
    assert with_fewer_ranks(command, said.append, 8) == fewer
    assert said == [
        f"going on with {fewer[2]} {'rank' if fewer[2] == '1' else 'ranks'}; the global batch stays the same"
    ]


@pytest.mark.parametrize(
    "command",
    [["deepspeed", "--num_gpus=1", "x.py"], ["deepspeed", "-H", "hosts", "x.py"], ["python", "launch/pretrain.py"]],
)
def test_where_no_rank_can_be_spared_the_command_stays(command: list[str]) -> None:
    assert with_fewer_ranks(command, print, 8) == command


def test_without_a_gpu_nothing_can_be_told(tmp_path: Path) -> None:
    assert list_gpus(str(tmp_path / "missing")) == ([], [])
    assert list_gpus(sys.executable)[1] == []
