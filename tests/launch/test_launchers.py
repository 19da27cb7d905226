"""`vitrail pretrain` and `vitrail finetune`: the launcher's command, the hostfile, and Ctrl-C under each launcher."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.commands.supervise import launcher_command
from launch.launchers import ACCELERATE_CONFIG, ask_to_stop, catches, list_gpus, read_hostfile, run_launcher
from pretrain.errors import UserError
from pretrain.heartbeat.watch import Watch
from pretrain.outcome import EXIT_CODE_FILE, Outcome, exit_rank
from pretrain.run_folder import claim_run_dir
from tests.support.classifiers import save_classifier, tiny_configs
from tests.support.launching import Finished, Shell, Vitrail, wait_for
from tests.support.runs import FINETUNE_YAML, PRETRAIN, losses

Tool = Callable[[str], str]


def words(printed: Finished) -> list[str]:
    """Return the printed command without the folder of the programs and the port, which is a free one."""
    assert printed.code == 0, printed.err
    found = printed.out.split()
    port = next((i for i, word in enumerate(found) if word.endswith("_port")), None)
    if port is not None:
        assert found.pop(port + 1).isdigit()
    return [Path(found[0]).name, *found[1:]]


def test_each_launcher_starts_the_same_script(vitrail: Vitrail, tiny: Path) -> None:
    pretrain = ["pretrain", "--config", tiny, "seed=1", "--print-command"]
    script = [str(PRETRAIN), "--config", str(tiny)]
    assert words(vitrail(*pretrain)) == [Path(sys.executable).name, *script, "seed=1"]
    two = [*pretrain, "--ranks", "2", "--resume"]
    deepspeed = ["deepspeed", "--log_level", "error", "--num_gpus", "2", "--master_port"]
    assert words(vitrail(*two)) == [*deepspeed, *script, "--resume", "seed=1"]
    torchrun = ["torchrun", "--nproc_per_node", "2", "--master_port"]
    assert words(vitrail(*two, "--launcher", "torchrun")) == [*torchrun, *script, "--resume", "seed=1"]
    accelerate = words(vitrail(*pretrain, "--launcher", "accelerate"))
    assert accelerate[:5] == ["accelerate", "launch", "--config_file", str(ACCELERATE_CONFIG), "--num_machines"]
    assert accelerate[-5:] == ["--cpu", *script, "seed=1"]


def test_what_a_launcher_cannot_do_is_refused(vitrail: Vitrail, tiny: Path, tmp_path: Path) -> None:
    two = ["pretrain", "--config", tiny, "--ranks", "2", "--launcher"]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("elsewhere slots=2\n")
    for options, sentence in (
        ([*two, "python"], "--launcher python starts one process, not 2; choose another launcher"),
        ([*two, "accelerate"], "--launcher accelerate starts only one process without GPUs; choose torchrun"),
        (
            [*two, "torchrun", "--hostfile", hostfile],
            "--hostfile needs --launcher deepspeed, got torchrun; remove one of the two",
        ),
        (
            [*two[:-1], "--hostfile", hostfile],
            f"--ranks: conflicts with {hostfile}, whose slots give the number of ranks; remove it",
        ),
    ):
        refused = vitrail(*options)
        assert (refused.code, refused.err) == (2, f"{sentence}\n")


def test_mistakes_in_the_config_are_found_before_a_launcher_starts(vitrail: Vitrail, tiny: Path) -> None:
    done = vitrail("pretrain", "--config", tiny, "sed=1", "--launcher", "torchrun", "--ranks", "2")
    assert (done.code, done.out, done.err) == (2, "", "command line: sed: unknown key; did you mean seed?\n")
    done = vitrail("pretrain", "--config", "photos_mae_ti16")
    assert done.err == "photos_mae_ti16: a recipe, not a file; write it with: vitrail init photos_mae_ti16\n"
    (tiny.parent / "lr=1.yaml").write_text(tiny.read_text())
    assert vitrail("pretrain", tiny.parent / "lr=1.yaml", "--print-command").code == 0
    done = vitrail("pretrain", "seed=1")
    assert (done.code, done.err) == (
        2,
        "no config file is named; write one with `vitrail init`, and add its name\n",
    )
    printed = vitrail("pretrain", tiny, "seed=1", "--print-config")
    assert printed.out == vitrail("pretrain", "--config", tiny, "seed=1", "--print-config").out
    assert "seed: 1 " in printed.out


def test_a_hostfile_that_names_only_this_machine_needs_no_ssh(vitrail: Vitrail, tiny: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"# one machine\n{socket.gethostname()} slots=3  # its GPUs\n\n")
    run = ["pretrain", "--config", tiny, "--print-command", "--hostfile", hostfile]
    assert words(vitrail(*run))[3:6] == ["--num_gpus", "3", "--master_port"]
    hostfile.write_text("localhost slots=1\ngpu-node-17 slots=2\n")
    assert words(vitrail(*run))[3:5] == ["--hostfile", str(hostfile)]
    assert read_hostfile(hostfile) == {"localhost": 1, "gpu-node-17": 2}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a slots=2\nb\n", ":2: must name each machine once, as HOST slots=NUMBER, got 'b'"),
        ("a slots=2\na slots=2\n", ":2: must name each machine once, as HOST slots=NUMBER, got 'a slots=2'"),
        ("a slots=x\n", ":1: must name each machine once, as HOST slots=NUMBER, got 'a slots=x'"),
        ("# nothing\n", ": names no machine; add a line such as gpu-node-01 slots=8"),
    ],
)
def test_a_wrong_hostfile_is_explained(tmp_path: Path, text: str, sentence: str) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(text)
    with pytest.raises(UserError) as refused:
        read_hostfile(hostfile)
    assert str(refused.value) == f"{hostfile}{sentence}"
    with pytest.raises(UserError, match=r"cannot read the hostfile \(.*\); check the path"):
        read_hostfile(tmp_path / "none")


@pytest.mark.processes
def test_gpus_are_those_of_the_driver_and_the_environment(
    vitrail: Vitrail, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list_gpus() == []  # the tests run without GPUs
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: A\\nGPU 2: A\\nGPU 3: A\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list_gpus() == ["0", "1", "2", "3"]
    assert words(vitrail("pretrain", tiny, "--print-command"))[3:5] == ["--num_gpus", "4"]
    for visible, expected in (("", []), ("-1", []), ("1", ["1"]), ("2,3", ["2", "3"]), ("0, 1,-1,2", ["0", "1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert list_gpus() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")  # deepspeed would take the first two in their place
    assert words(vitrail("pretrain", tiny, "--print-command"))[3:5] == ["--include", "localhost:2,3"]


@pytest.mark.slow
def test_ranks_on_other_machines_are_asked_to_stop_through_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing below the launcher is a rank, but a rank writes heartbeats: it gets the order as SIGTERM."""
    claim_run_dir(tmp_path)
    assert not ask_to_stop(os.getpid(), tmp_path)
    received: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: received.append(number))
    with Watch(tmp_path, 0, 1) as watch:
        assert ask_to_stop(os.getpid(), tmp_path)
        wait_for(lambda: received)
        watch.finish(Outcome.STOPPED)
    assert received == [signal.SIGTERM]


def test_a_stop_is_reported_in_a_file_because_launchers_answer_it_with_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "code"
    monkeypatch.setenv(EXIT_CODE_FILE, str(file))
    for code, ends_with in ((1, 1), (2, 2), (0, 0), (75, 0), (130, 0)):
        with pytest.raises(SystemExit) as ended:
            exit_rank(code)
        assert ended.value.code == ends_with
        assert (file.read_text() if file.exists() else "") == (str(code) if ends_with != code else "")
    monkeypatch.delenv(EXIT_CODE_FILE)
    with pytest.raises(SystemExit) as ended:
        exit_rank(75)
    assert ended.value.code == 75


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(2)", 2), ("sys.exit(75)", 75), ("sys.exit(247)", 1), ("os.kill(os.getpid(), 9)", 1)]
)
def test_a_launcher_ends_with_a_code_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, code: int
) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest keeps its own
    command = [sys.executable, "-c", f"import os, sys; {ending}"]
    assert run_launcher(command, tmp_path, os.environ) == code


@pytest.mark.processes
def test_the_supervisor_runs_what_vitrail_pretrain_would_run(
    tiny: Path, tool: Tool, capfd: pytest.CaptureFixture[str]
) -> None:
    pretrain = [tool("vitrail"), "pretrain", "--config", str(tiny)]
    command = launcher_command([*pretrain, "--ranks", "2"])
    assert Path(command[0]).name == "deepspeed"
    assert command[-3:] == [str(PRETRAIN), "--config", str(tiny)]
    other = ["torchrun", "pretrain.py", "--config", "x"]
    assert launcher_command(other) == other
    module = [sys.executable, "-m", "vitrail", *pretrain[1:]]
    assert launcher_command(module)[1:] == [str(PRETRAIN), "--config", str(tiny)]
    with pytest.raises(SystemExit) as refused:
        launcher_command([*pretrain, "sed=1"])
    assert refused.value.code == 2
    assert capfd.readouterr().err == "command line: sed: unknown key; did you mean seed?\n"


@pytest.mark.processes
def test_whether_a_process_handles_a_signal(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    program = f"import signal, time; signal.signal(10, print); open({str(ready)!r}, 'w'); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while not ready.exists():
            assert process.poll() is None
        assert catches(process.pid, signal.SIGUSR1)
        assert not catches(process.pid, signal.SIGUSR2)
        process.kill()
    assert not catches(process.pid, signal.SIGUSR1)


def test_ctrl_c_ends_with_one_sentence_under_each_launcher(
    shell: Shell, tiny: Path, digits: Path, tool: Tool, tmp_path: Path
) -> None:
    """The terminal sends Ctrl-C to `vitrail` alone; it saves what there is and stays quiet about the launcher."""
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text(FINETUNE_YAML.format(folder=tmp_path, digits=digits))
    model = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    pretrain = ["pretrain", tiny, "schedule.total_steps=5000", "--launcher", "deepspeed"]
    finetune = ["finetune", recipe, "schedule.epochs=500", f"model={model}", "--launcher", "torchrun"]
    for command, name, code, sentence in (
        (pretrain, "stopped", 75, "stopped as requested; the same command continues the run"),
        (finetune, "halted", 130, "stopped after step"),
    ):
        run_dir = tmp_path / name
        options = ["--ranks", "2", "data.num_workers=0", "tracking.uri=off", f"run_dir={run_dir}"]
        with shell.start([tool("vitrail"), *command, *options]) as running:
            running.wait_until(lambda run_dir=run_dir: len(losses(run_dir)) >= 2)
            os.killpg(running.process.pid, signal.SIGINT)
            done = running.finish()
        assert done.code == code, done.err[-3000:]
        assert done.out.splitlines()[-1].startswith(sentence)
        assert done.out.startswith(f"$ {tool(str(command[-1]))} ")
        assert not done.err
