"""Two nodes, each with its own address, under the deepspeed launcher."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pretrain.checkpoint.history import list_checkpoints
from tests.support.launching import Shell
from tests.support.runs import PRETRAIN, losses
from tests.support.training import Trained, column

Tool = Callable[[str], str]


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, str]]:
    """Create two network namespaces, each with its own address, that are connected by a virtual cable."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (iproute2) to make network namespaces")
    names = f"vitrail{os.getpid()}a", f"vitrail{os.getpid()}b"
    cable = f"tsa{os.getpid()}", f"tsb{os.getpid()}"
    commands = [["ip", "netns", "add", name] for name in names]
    commands += [["ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]]]
    for i, (name, end_of_cable) in enumerate(zip(names, cable, strict=True), start=1):
        inside = ["ip", "netns", "exec", name, "ip"]
        commands += [
            ["ip", "link", "set", end_of_cable, "netns", name],
            [*inside, "addr", "add", f"10.77.0.{i}/24", "dev", end_of_cable],
            [*inside, "link", "set", end_of_cable, "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_nodes_give_the_losses_of_one(
    shell: Shell, tiny: Path, tool: Tool, two_nodes: tuple[str, str], trained: Trained, tmp_path: Path
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    with ExitStack() as stack:
        nodes = []
        for i, namespace in enumerate(two_nodes):
            launcher = [tool("deepspeed"), "--hostfile", hostfile, "--no_ssh", "--node_rank", str(i)]
            launcher += ["--master_addr", "10.77.0.1", "--master_port", "29631"]  # free: the namespaces are new
            command = ["ip", "netns", "exec", namespace, *launcher, PRETRAIN, "--config", tiny, "tracking.uri=off"]
            command += ["data.num_workers=0"]
            card = f"ts{'ab'[i]}{os.getpid()}"
            nodes.append(stack.enter_context(shell.start(command, GLOO_SOCKET_IFNAME=card)))
        done = [node.finish() for node in nodes]
    assert [each.code for each in done] == [0, 0], [each.err[-3000:] for each in done]
    one = column(trained(2, "zero2"), "train/loss")
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(one, abs=1e-5)
    assert len(one) == 8
    assert len(list_checkpoints(tmp_path / "runs" / "tiny")) == 2
