"""`vitrail pretrain` and `vitrail finetune`: start a stage under a launcher, from any directory."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.commands.terminal import report_errors
from pretrain.cores import available_cores
from pretrain.errors import UserError

# Fine-tuning needs nothing of DeepSpeed, and accelerate starts only one process where there are no GPUs.
DEFAULT_LAUNCHERS = {"pretrain": "deepspeed", "finetune": "torchrun"}

Launcher = Literal["deepspeed", "torchrun", "accelerate", "python"]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", show_default="the first argument", help="YAML config file; `vitrail init` writes one."),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE] [KEY.PATH=VALUE]...",
        help="The config file, unless --config names it, and values that override the file's, such as seed=1.",
    ),
]
Ranks = Annotated[
    int | None, typer.Option(min=1, show_default="one per GPU, or 1", help="Number of processes that train together.")
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print every value of the config with its origin, and exit.")
]
PrintCommand = Annotated[
    bool, typer.Option("--print-command", help="Print the launcher's command, for scripts of your own, and exit.")
]


def pretrain(
    words: Words = None,
    config: ConfigFile = None,
    launcher: Annotated[
        Launcher | None,
        typer.Option(show_default="deepspeed, or python for one process", help="Program that starts the processes."),
    ] = None,
    ranks: Ranks = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="Machines to train on, one `HOST slots=GPUS` per line; only with --launcher deepspeed."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail if the run folder has no checkpoint, instead of starting a new run.")
    ] = False,
    print_config: PrintConfig = False,
    print_command: PrintCommand = False,
) -> None:
    """Pretrain a Vision Transformer. If the run folder has a checkpoint, the run resumes from it.

    Checks the config, finds the GPUs, prints the launcher's command and runs it. Ctrl-C, SIGTERM and SIGUSR1 save a
    checkpoint and end the run with exit code 75; the same command resumes it. All keys of the config are listed in
    docs/config.md.

    Example: vitrail pretrain my.yaml optimizer.learning_rate=3e-4

    Example: vitrail pretrain my.yaml --launcher torchrun --ranks 4 run_dir=runs/second
    """
    from pretrain.config import PretrainConfig
    from pretrain.configfile import load_config

    with report_errors():
        file, overrides = find_config(config, words or [])
        loaded = load_config(PretrainConfig, file, overrides)
        if print_config:
            print(loaded.text, end="")
            return
        command, environment = build_command("pretrain", launcher, ranks, hostfile)
    options = ["--resume"] if resume else []
    command += ["--config", str(file), *options, *overrides]
    start(command, environment, loaded.config.run_dir, print_command)


def finetune(
    words: Words = None,
    config: ConfigFile = None,
    launcher: Annotated[
        Launcher | None,
        typer.Option(show_default="torchrun, or python for one process", help="Program that starts the processes."),
    ] = None,
    ranks: Ranks = None,
    print_config: PrintConfig = False,
    print_command: PrintCommand = False,
) -> None:
    """Fine-tune a Hugging Face folder of an image model on your classes.

    Checks the config, finds the GPUs, prints the launcher's command and runs it. Ctrl-C ends the run and keeps the best
    model so far. All keys of the config are listed in docs/config.md.

    Example: vitrail finetune my.yaml model=runs/photos/export run_dir=runs/classes
    """
    from finetune.config import FinetuneConfig
    from pretrain.configfile import load_config

    with report_errors():
        file, overrides = find_config(config, words or [])
        loaded = load_config(FinetuneConfig, file, overrides)
        if print_config:
            print(loaded.text, end="")
            return
        command, environment = build_command("finetune", launcher, ranks, None)
    start([*command, "--config", str(file), *overrides], environment, loaded.config.run_dir, print_command)


def find_config(config: Path | None, words: list[str]) -> tuple[Path, list[str]]:
    """Return the config file and the overrides.

    Args:
        config: File that --config names, or None.
        words: Arguments of the command; the first one is the config file if `config` is None.

    Raises:
        UserError: If no file is named, or if a recipe is named that has not been written to a file.
    """
    from launch.commands.init import find_recipes

    if config is None:
        if not words or ("=" in words[0] and not Path(words[0]).exists()):
            raise UserError("no config file is named; write one with `vitrail init`, and add its name")
        config, words = Path(words[0]), words[1:]
    if not config.exists() and str(config) in find_recipes():
        raise UserError(f"{config}: a recipe, not a file; write it with: vitrail init {config}")
    return config, words


def build_command(
    stage: str, launcher: Launcher | None, ranks: int | None, hostfile: Path | None
) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts a stage, up to its launch script, and the variables that it needs.

    Args:
        stage: "pretrain" or "finetune".
        launcher: Program that starts the processes; None chooses one that suits the stage and the number of ranks.
        ranks: Number of ranks on this machine; None starts one per GPU, or a single one without GPUs.
        hostfile: DeepSpeed hostfile. One that names only this machine is read here, and needs no ssh.

    Raises:
        UserError: If the options contradict each other, or the launcher cannot start so many ranks.
    """
    from launch.launchers import DEEPSPEED, LAUNCHERS, SCRIPTS, list_gpus, read_hostfile
    from launch.supervisor.resources import is_this_machine

    if hostfile is not None:
        if launcher not in (None, "deepspeed"):
            raise UserError(f"--hostfile needs --launcher deepspeed, got {launcher}; remove one of the two")
        slots = read_hostfile(hostfile)
        if not all(map(is_this_machine, slots)):
            if ranks is not None:
                raise UserError(f"--ranks: conflicts with {hostfile}, whose slots give the number of ranks; remove it")
            return [*DEEPSPEED, "--hostfile", str(hostfile), SCRIPTS[stage]], {}
        ranks = ranks or sum(slots.values())
    gpus = list_gpus()
    ranks = ranks or len(gpus) or 1
    default = "python" if ranks == 1 else DEFAULT_LAUNCHERS[stage]
    # Without the first, torchrun starts one thread per rank and says so in four lines; without the second, deepspeed
    # searches for an accelerator and warns that there is none.
    variables = {"OMP_NUM_THREADS": str(max(1, available_cores() // ranks))}
    variables |= {} if gpus else {"DS_ACCELERATOR": "cpu"}
    return [*LAUNCHERS[launcher or default](ranks, gpus), SCRIPTS[stage]], variables


def start(command: list[str], variables: dict[str, str], run_dir: Path, print_command: bool) -> None:
    """Run a launcher's command and exit with the code of the run, or only print the command.

    Args:
        command: Command of the launcher.
        variables: Environment variables for it; those that are set already keep their values.
        run_dir: Run folder.
        print_command: Whether to print the command and do nothing else.
    """
    from launch.launchers import run_launcher

    if print_command:
        print(shlex.join(command))
        return
    print(f"$ {shlex.join(command)}", flush=True)
    environment = {**variables, **os.environ}
    if command[0] == sys.executable:
        os.execve(command[0], command, environment)  # a single process needs nobody to pass on its signals
    sys.exit(run_launcher(command, run_dir, environment))
