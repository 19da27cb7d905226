"""Two nodes, each with its own address and host name: pods under torchrun, then the deepspeed launcher without ssh."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from pretrain.checkpoint.history import list_checkpoints
from tests.support.launching import ROOT, Running, Shell
from tests.support.runs import PRETRAIN, losses
from tests.support.training import LONG, LONG_RUN, Trained, column

Tool = Callable[[str], str]


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, str]]:
    """Create two network namespaces, each with its own address, that are connected by a virtual cable."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (iproute2) to make network namespaces")
    names = f"vitrail{os.getpid()}a", f"vitrail{os.getpid()}b"
    cable = f"tsa{os.getpid()}", f"tsb{os.getpid()}"
    commands = [["unshare", "--uts", "true"], *(["ip", "netns", "add", name] for name in names)]
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


def test_pods_stop_together_and_nodes_without_ssh_continue_with_the_losses_of_one(
    shell: Shell, tiny: Path, tool: Tool, two_nodes: tuple[str, str], trained: Trained, tmp_path: Path
) -> None:
    run_dir, config = (
        tmp_path / "runs" / "tiny",
        ["--config", tiny, *LONG_RUN, "tracking.uri=off", "data.num_workers=0"],
    )

    def start(stack: ExitStack, commands: list[list[str | Path]]) -> list[Running]:
        nodes = zip(two_nodes, commands, strict=True)
        return [stack.enter_context(start_on_node(shell, i, name, command)) for i, (name, command) in enumerate(nodes)]

    with ExitStack() as stack:
        pods = start(stack, [pod_command(tool, i, config) for i in range(2)])
        pods[0].wait_until(lambda: len(losses(run_dir)) >= 3)
        pods[0].process.send_signal(signal.SIGTERM)  # as when its node is drained
        done = [pod.finish() for pod in pods]
    assert [each.code for each in done] == [75, 75], [each.err[-3000:] for each in done]
    stopped_at = len(losses(run_dir))
    assert 3 <= stopped_at < 150

    hostfile = tmp_path / "hostfile"
    hostfile.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    launcher = [tool("deepspeed"), "--hostfile", hostfile, "--no_ssh", "--master_addr", "10.77.0.1"]
    launcher += ["--master_port", "29631"]  # free: the namespaces are new
    with ExitStack() as stack:
        nodes = start(stack, [[*launcher, "--node_rank", str(i), PRETRAIN, *config] for i in range(2)])
        done = [node.finish() for node in nodes]
    assert [each.code for each in done] == [0, 0], [each.err[-3000:] for each in done]
    assert f"from step {stopped_at}" in done[0].out
    one = column(trained(2, LONG), "train/loss")
    assert losses(run_dir) == pytest.approx(one, abs=1e-5)
    assert len(one) == 150
    assert list_checkpoints(run_dir)[-1].name == "step-00000150"


def start_on_node(shell: Shell, i: int, namespace: str, command: list[str | Path]) -> Running:
    """Start a command on one of the nodes, whose host name is then pod0 or pod1."""
    inside = ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", f'hostname pod{i}; exec "$@"', "sh"]
    return shell.start([*inside, *command], GLOO_SOCKET_IFNAME=f"ts{'ab'[i]}{os.getpid()}")


def pod_command(tool: Tool, i: int, arguments: list[str | Path]) -> list[str | Path]:
    """Return the command of a pod of launch/cluster/kubernetes.yaml, with one rank, our address and our arguments."""
    manifests = yaml.safe_load_all((ROOT / "launch" / "cluster" / "kubernetes.yaml").read_text())
    job = next(manifest for manifest in manifests if manifest["kind"] == "Job")
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    here = {
        "vitrail": tool("vitrail"),
        "torchrun": tool("torchrun"),
        "--nproc_per_node=8": "--nproc_per_node=1",
        "--node_rank=$(JOB_COMPLETION_INDEX)": f"--node_rank={i}",
        "--master_addr=vitrail-0.vitrail": "--master_addr=10.77.0.1",
    }
    assert {*here} <= {*command}
    return [*(here.get(word, word) for word in command[: command.index("launch/pretrain.py")]), PRETRAIN, *arguments]
