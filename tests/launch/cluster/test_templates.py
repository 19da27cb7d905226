"""What launch/cluster/ and docs/cluster.md name exists: commands, options, config keys, files and exit codes."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

from launch.cli import app
from pretrain import outcome
from pretrain.config import PretrainConfig
from pretrain.configfile import build_parser, load_config
from pretrain.heartbeat.beats import beats_folder
from pretrain.outcome import EXIT_RESUMABLE, EXIT_USER_ERROR
from tests.support.launching import ROOT

CLUSTER, GUIDE = ROOT / "launch" / "cluster", ROOT / "docs" / "cluster.md"
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(CLUSTER.iterdir())}
KUBERNETES = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(FILES["kubernetes.yaml"])}
JOB: dict[str, Any] = KUBERNETES["Job"]["spec"]
POD: dict[str, Any] = JOB["template"]["spec"]
SKYPILOT: dict[str, Any] = yaml.safe_load(FILES["skypilot.yaml"])

SCRIPT, SBATCH = "launch/pretrain.py", "launch/cluster/slurm.sbatch"
RUN_ARGUMENTS = "--config configs/pretrain/vit_b16.yaml run_dir=/shared/runs/vit_b16"
VARIABLE = re.compile(r'"\$\(echo "[^"]*" [^)]*\)"|\$\([^)]*\)|\$\{[^}]*\}|\$\w+')


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of the commands of ours in a shell text, with 1 in the place of each variable."""
    for line in text.replace('"$@" &', RUN_ARGUMENTS).replace("\\\n", " ").splitlines():
        words = shlex.split(VARIABLE.sub("1", line.strip().removeprefix("exec ")), comments=True)
        if words and words[0] in ("vitrail", "torchrun", "deepspeed", "sbatch"):
            yield words


def headers() -> str:
    """Return the examples in the comments of the files."""
    return "\n".join(re.findall(r"^# {3,}(.*)$", "\n".join(FILES.values()), re.MULTILINE))


def blocks() -> str:
    """Return the code blocks of the guide."""
    return "\n".join(re.findall(r"^ *```\n(.*?)^ *```", GUIDE.read_text(), re.DOTALL | re.MULTILINE))


SLURM_BODY = "\n".join(line for line in FILES["slurm.sbatch"].splitlines() if not line.startswith("#"))
SHELL = {
    "guide": blocks(),
    "headers": headers(),
    "slurm": SLURM_BODY,
    "setup": SKYPILOT["setup"],
    "run": SKYPILOT["run"],
}
COMMANDS = [words for text in SHELL.values() for words in commands(text)]
COMMANDS.append([VARIABLE.sub("1", word) for word in POD["containers"][0]["command"]])


def check_run_arguments(words: list[str]) -> None:
    """Parse the arguments of launch/pretrain.py and load its config with the overrides."""
    parsed = build_parser(PretrainConfig, "", "", resumable=True).parse_intermixed_args(words)
    load_config(PretrainConfig, parsed.config, parsed.overrides)


def check_launcher(words: list[str]) -> None:
    """Parse the arguments of the launcher that starts launch/pretrain.py, and those of the script."""
    end = words.index(SCRIPT)
    begin = max(i for i, word in enumerate(words[:end]) if word in ("torchrun", "deepspeed"))
    if words[begin] == "torchrun":
        parsed = get_args_parser().parse_args(words[begin + 1 :])
        assert parsed.training_script == SCRIPT
        check_run_arguments(parsed.training_script_args)
    else:
        parsed = runner.parse_args(words[begin + 1 :])
        assert parsed.user_script == SCRIPT
        check_run_arguments(parsed.user_args)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "vitrail":
        command, arguments = typer.main.get_command(app), words[1:]
        while hasattr(command, "commands"):
            command, arguments = command.commands[arguments[0]], arguments[1:]
        command.make_context("vitrail", arguments)
    if SBATCH in words:
        check_run_arguments(words[words.index(SBATCH) + 1 :])
    if SCRIPT in words:
        check_launcher(words)


def test_commands_are_found() -> None:
    """Each place names a training command, so that the test above is not empty."""
    assert {
        name: sum(SCRIPT in words or SBATCH in words for words in commands(text)) for name, text in SHELL.items()
    } == {
        "guide": 4,
        "headers": 2,
        "slurm": 1,
        "setup": 0,
        "run": 1,
    }


@pytest.mark.processes
@pytest.mark.parametrize(
    "text", [FILES["slurm.sbatch"], SKYPILOT["setup"], SKYPILOT["run"]], ids=["slurm", "setup", "run"]
)
def test_shell_scripts_have_no_syntax_errors(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", [GUIDE, *sorted(CLUSTER.iterdir())], ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"\b((?:launch|configs|docs|tests)/[\w./-]*\w)", text)
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in links if not (path.parent / name).exists()] == []


def test_guide_names_every_file() -> None:
    assert [name for name in FILES if f"../launch/cluster/{name})" not in GUIDE.read_text()] == []


def test_guide_names_config_keys_that_exist() -> None:
    keys = re.findall(r"`((?:data|tracking|checkpoint|health)\.\w+)`", GUIDE.read_text())
    assert {"data.cache_dir", "health.hang_seconds"} <= {*keys}
    for key in keys:
        section, name = key.split(".")
        assert name in PretrainConfig.model_fields[section].annotation.model_fields, key  # type: ignore[union-attr]
    assert f"`{beats_folder(Path()).name}/`" in GUIDE.read_text()


def test_kubernetes_pods_find_each_other() -> None:
    service, command = KUBERNETES["Service"], POD["containers"][0]["command"]
    name = KUBERNETES["Job"]["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"  # YAML reads None as text
    assert service["spec"]["selector"] == {"job-name": name}
    assert POD["subdomain"] == service["metadata"]["name"]
    assert f"--master_addr={name}-0.{POD['subdomain']}" in command
    assert JOB["completionMode"] == "Indexed"
    assert JOB["completions"] == JOB["parallelism"]
    assert f"--nnodes={JOB['completions']}" in command
    assert f"--nproc_per_node={POD['containers'][0]['resources']['limits']['nvidia.com/gpu']}" in command


def test_kubernetes_volumes_are_mounted() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in POD["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert mounts == {"shm": "/dev/shm", "cache": "/cache", "shared": "/shared"}
    assert {*volumes} == {*mounts}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_guide_explains_every_exit_code() -> None:
    rows = re.findall(r"^\| (\d+) \| \w", GUIDE.read_text(), re.MULTILINE)
    assert [int(code) for code in rows] == sorted(
        value for name, value in vars(outcome).items() if name.startswith("EXIT_") and isinstance(value, int)
    )


def test_schedulers_know_our_exit_codes() -> None:
    rules = [rule for rule in JOB["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert {rule["action"]: rule["onExitCodes"]["values"] for rule in rules} == {
        "FailJob": [EXIT_USER_ERROR],
        "Ignore": [EXIT_RESUMABLE],
    }
    assert POD["restartPolicy"] == "Never"  # a failure policy needs it
    assert SKYPILOT["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_RESUMABLE]
    assert f'"$code" = {EXIT_RESUMABLE} ]' in FILES["slurm.sbatch"]
