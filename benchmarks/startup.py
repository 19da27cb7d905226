"""Measure the CPU seconds of `--help`, `--print-config` and a config error; each should take at most half a second.

python benchmarks/startup.py
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VITRAIL = Path(sys.executable).parent / "vitrail"
NUM_ROUNDS = 7
MAX_SECONDS = 0.5


def cpu_seconds(name: str, command: list[str]) -> float:
    """Return the user and system time of one run of a command.

    Args:
        name: Name of the measurement; "error" in it means that exit code 2 is expected.
        command: Words of the command.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != (2 if "error" in name else 0):
        sys.exit(f"{name}: unexpected exit code {done.returncode}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    recipe = ROOT / "configs" / "quickstart" / "supervised.yaml"
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        wrong.write_text(recipe.read_text(encoding="utf-8") + "sead: 1\n", encoding="utf-8")
        pretrain = [sys.executable, str(ROOT / "launch" / "pretrain.py")]
        finetune = [sys.executable, str(ROOT / "launch" / "finetune.py")]
        commands = {
            "pretrain.py, config error": [*pretrain, "--config", str(wrong)],
            "finetune.py, config error": [*finetune, "--config", str(wrong)],
            "pretrain.py --print-config": [*pretrain, "--config", str(recipe), "--print-config"],
            "pretrain.py --help": [*pretrain, "--help"],
            "finetune.py --help": [*finetune, "--help"],
            "vitrail --help": [str(VITRAIL), "--help"],
            **{
                f"vitrail {verb} --help": [str(VITRAIL), *verb.split(), "--help"]
                for verb in ("shards", "shards make", "shards index", "export", "predict", "checkpoints", "supervise")
            },
        }
        print(f"| | CPU seconds, median of {NUM_ROUNDS} | highest | within {MAX_SECONDS} |\n|---|---|---|---|")
        for name, command in commands.items():
            cpu_seconds(name, command)  # not measured: Python compiles the byte code
            seconds = [cpu_seconds(name, command) for _ in range(NUM_ROUNDS)]
            is_within = "yes" if statistics.median(seconds) <= MAX_SECONDS else "no"
            print(f"| {name} | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {is_within} |")


if __name__ == "__main__":
    main()
