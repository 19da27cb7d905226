"""A command is changed only to leave out GPUs and machines that do not respond, or one rank."""

import socket
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_resource_filter

from launch.supervisor import resources
from launch.supervisor.resources import (
    is_this_machine,
    list_gpus,
    list_unreachable_hosts,
    with_fewer_ranks,
    without_lost_resources,
)

COMMAND = ["deepspeed", "--num_gpus", "4", "launch/pretrain.py"]


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace ssh by a script that cannot reach node-2 and hangs for node-3; return a hostfile."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\ncase "$*" in *node-2*) exit 255;; *node-3*) exec sleep 60;; esac\n')
    ssh.chmod(0o755)
    monkeypatch.setattr(resources, "SSH", (str(ssh), "-o", "BatchMode=yes"))
    monkeypatch.setattr(resources, "PROBE_SECONDS", 1.0)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# the machines\nnode-1 slots=8\nnode-2 slots=8\n\nnode-3 slots=4\n")
    return hostfile


@pytest.mark.processes
def test_unreachable_hosts_are_excluded(fake_ssh: Path) -> None:
    assert list_unreachable_hosts(fake_ssh) == ["node-2", "node-3"]
    reported: list[str] = []
    command = without_lost_resources(
        ["deepspeed", "--hostfile", str(fake_ssh), "launch/pretrain.py"], reported.append, 0
    )
    assert command == ["deepspeed", "--exclude", "node-2@node-3", "--hostfile", str(fake_ssh), "launch/pretrain.py"]
    assert reported == ["node-2, node-3: not reachable with ssh; continuing without these machines"]
    pool = {"node-1": [0, 1], "node-2": [0, 1], "node-3": [0]}
    assert dict(parse_resource_filter(pool, exclude_str=command[2])) == {"node-1": [0, 1]}


def test_this_machine_needs_no_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(is_this_machine, ("localhost", "127.0.0.1", socket.gethostname())))
    assert not any(map(is_this_machine, ("192.0.2.1", "no-such-host.invalid")))  # an address reserved for examples
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"{socket.gethostname()} slots=2\n")
    monkeypatch.setattr(resources, "SSH", ("false",))
    assert list_unreachable_hosts(hostfile) == []
    hostfile.write_text("192.0.2.1 slots=2\n")
    monkeypatch.setattr(resources, "SSH", (str(tmp_path / "missing"),))
    assert list_unreachable_hosts(hostfile) == []


EACH_ITS_OWN = [
    ["deepspeed", "--hostfile", "hosts", "--no_ssh", "--node_rank", "1", "launch/pretrain.py"],
    ["torchrun", "--nnodes", "2", "--nproc_per_node", "gpu", "launch/pretrain.py"],
    ["srun", "torchrun", "--nnodes=2", "--nproc_per_node=8", "launch/pretrain.py"],
]


@pytest.mark.parametrize("command", EACH_ITS_OWN, ids=["no_ssh", "torchrun", "srun"])
def test_command_that_several_machines_run_is_unchanged(command: list[str]) -> None:
    assert without_lost_resources(command, print, 16) == command
    assert with_fewer_ranks(command, print, 16) == command


def test_missing_hostfile_leaves_the_command_unchanged(tmp_path: Path) -> None:
    command = ["deepspeed", "--hostfile", str(tmp_path / "missing"), "launch/pretrain.py"]
    assert without_lost_resources(command, print, 0) == command


@pytest.mark.processes
def test_failed_gpus_are_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *count*) echo 4;; *" 1") exit 1;; esac\n')
    python.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert list_gpus(str(python)) == ([0, 2, 3], [1])
    monkeypatch.setattr(resources, "list_gpus", lambda: list_gpus(str(python)))
    reported: list[str] = []
    command = without_lost_resources(COMMAND, reported.append, 0)
    assert command == ["deepspeed", "--include", "localhost:0,2,3", "launch/pretrain.py"]
    assert reported == ["GPU 1: not responding; continuing without these GPUs"]
    pool = {"localhost": [0, 1, 2, 3]}
    assert parse_resource_filter(pool, include_str="localhost:0,2,3") == {"localhost": [0, 2, 3]}
    assert without_lost_resources(command, reported.append, 0) == command  # a second call changes nothing


@pytest.mark.parametrize("gpus", [([0, 1, 2, 3, 4], []), ([], [])], ids=["all work", "none can be probed"])
def test_command_is_unchanged_if_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[list[int], list[int]]
) -> None:
    monkeypatch.setattr(resources, "list_gpus", lambda: gpus)
    assert without_lost_resources(COMMAND, print, 0) == COMMAND


def test_command_uses_only_the_gpus_that_still_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "list_gpus", lambda: ([0, 1, 2], []))
    for command in (COMMAND, ["deepspeed", "--num_gpus=4", "launch/pretrain.py"]):
        assert without_lost_resources(command, print, 0) == [
            "deepspeed",
            "--include",
            "localhost:0,1,2",
            "launch/pretrain.py",
        ]


DEEPSPEED, TORCHRUN = ["deepspeed", "launch/pretrain.py"], ["torchrun", "--nproc_per_node", "gpu", "launch/pretrain.py"]


def test_number_of_ranks_is_added_if_the_launcher_would_count_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "list_gpus", lambda: ([0, 1, 3], [2]))
    assert without_lost_resources(DEEPSPEED, print, 4) == [
        "deepspeed",
        "--include",
        "localhost:0,1,3",
        "launch/pretrain.py",
    ]
    assert without_lost_resources(DEEPSPEED, print, 0) == DEEPSPEED  # no rank started, so their number is unknown


@pytest.mark.parametrize(
    ("command", "fewer"),
    [
        (COMMAND, ["deepspeed", "--num_gpus", "3", "launch/pretrain.py"]),
        (DEEPSPEED, ["deepspeed", "--num_gpus", "7", "launch/pretrain.py"]),
        (TORCHRUN, ["torchrun", "--nproc_per_node", "7", "launch/pretrain.py"]),
        (["torchrun", "--nproc-per-node=2", "x.py"], ["torchrun", "--nproc-per-node", "1", "x.py"]),
        (["torchrun", "--nproc_per_node=2", "--nnodes=1"], ["torchrun", "--nproc_per_node", "1", "--nnodes=1"]),
    ],
)
def test_with_fewer_ranks_removes_one_rank(command: list[str], fewer: list[str]) -> None:
    reported: list[str] = []
    assert with_fewer_ranks(command, reported.append, 8) == fewer
    assert reported == [
        f"continuing with {fewer[2]} {'rank' if fewer[2] == '1' else 'ranks'}; the global batch size is unchanged"
    ]


@pytest.mark.parametrize(
    "command",
    [["deepspeed", "--num_gpus=1", "x.py"], ["deepspeed", "-H", "hosts", "x.py"], ["python", "launch/pretrain.py"]],
)
def test_with_fewer_ranks_leaves_other_commands_unchanged(command: list[str]) -> None:
    assert with_fewer_ranks(command, print, 8) == command


@pytest.mark.processes
def test_list_gpus_returns_nothing_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_gpus(sys.executable) == ([], [])  # CUDA_VISIBLE_DEVICES is empty, as it is for all tests
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert list_gpus(str(tmp_path / "missing")) == ([], [])
    assert list_gpus(sys.executable)[1] == []
