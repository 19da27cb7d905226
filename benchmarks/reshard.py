"""Resume at every world size and ZeRO stage from every other; compared with DeepSpeed's own two ways to load.

    python benchmarks/reshard.py                        # fp32, world sizes 1 to 4, stages 0 to 3: 256 combinations
    python benchmarks/reshard.py --precision bf16
    python benchmarks/reshard.py --world-sizes 1 2 --stages 1      # the smallest run

A tiny ViT trains for 14 steps on scikit-learn's digits at each world size and stage and saves at step 4. Then a run
resumes at each world size and stage from each of these checkpoints, and its next 10 losses are compared with those of
the uninterrupted run. For each world size, one launch trains and one launch loads; each builds its engines one after
another.

DeepSpeed's `load_checkpoint` is tried on DeepSpeed's own checkpoints, and on the checkpoints that its `ds_to_universal`
converts from them. A load is correct if every rank then holds the saved weights and moments, bit for bit.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes

SAVED_AT, STEPS = 4, 14
LAUNCH_SECONDS = 1500
UNIVERSAL = "universal"
TAG = "final"  # name of every checkpoint that DeepSpeed saves
LOADERS = {"load_checkpoint": "deepspeed", "ds_to_universal, then load_checkpoint": UNIVERSAL}
CONFIG = """
run_dir: unused
seed: 3
data: {{train: {shards}/train, num_workers: 0, shuffle_window: 4}}
model: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, mlp_ratio: 2, patch_size: 8, image_size: 32}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{total_steps: {steps}, warmup_steps: 2}}
engine: {{global_batch_size: 24, micro_batch_size: 6}}
logging: {{every_steps: 1}}
checkpoint: {{every_steps: {saved_at}, keep_last: 9}}
tracking: {{uri: "off"}}
"""


@dataclass(frozen=True)
class Grid:
    """Combinations of world sizes and ZeRO stages at which checkpoints are saved and loaded.

    Attributes:
        world_sizes: Numbers of ranks.
        stages: ZeRO stages.
    """

    world_sizes: list[int]
    stages: list[int]

    def names(self) -> list[str]:
        """Return the name of each combination."""
        return [combination_name(world_size, stage) for world_size in self.world_sizes for stage in self.stages]


def combination_name(world_size: int, stage: int) -> str:
    """Return the name of one combination, which is also the name of its folder."""
    return f"{world_size} ranks, stage {stage}"


def train_all(work: Path, precision: str, grid: Grid) -> None:
    """Train from the first to the last step at each stage, and also save with DeepSpeed (on every rank)."""
    from pretrain import distributed

    for stage in grid.stages:
        name = combination_name(distributed.world_size(), stage)
        run = _train_to_end(work, work / name, stage, precision)
        run.engine.save_checkpoint(str(work / "deepspeed" / name), tag=TAG)
        distributed.barrier()


def load_all(work: Path, precision: str, grid: Grid) -> None:
    """Resume at each stage from the checkpoint of each combination, and try to load with DeepSpeed (on every rank)."""
    from pretrain import distributed

    problems: dict[str, dict[str, str]] = {loader: {} for loader in LOADERS}
    for stage in grid.stages:
        target = combination_name(distributed.world_size(), stage)
        for source in grid.names():
            run_dir = work / "resumed" / f"{source} to {target}"
            if distributed.is_main():
                checkpoint = Path("checkpoints") / f"step-{SAVED_AT:08d}"
                shutil.copytree(work / source / checkpoint, run_dir / checkpoint)
            distributed.barrier()
            run = _train_to_end(work, run_dir, stage, precision)
            for loader, folder in LOADERS.items():
                run.engine._config.load_universal_checkpoint = folder == UNIVERSAL
                saved = work / source / "checkpoints" / f"step-{STEPS:08d}"
                problems[loader][run_dir.name] = _load_with_deepspeed(run.engine, work / folder / source, saved)
    if distributed.is_main():
        (work / f"deepspeed-{distributed.world_size()}.json").write_text(json.dumps(problems))


def convert_all(work: Path, precision: str, grid: Grid) -> None:
    """Convert DeepSpeed's checkpoints to universal checkpoints, as far as `ds_to_universal` can."""
    from deepspeed.checkpoint import ds_to_universal

    for name in grid.names():
        saved, out = work / "deepspeed" / name / TAG, work / UNIVERSAL / name / TAG
        command = [sys.executable, ds_to_universal.__file__, "--inject_missing_state"]
        command += ["--input_folder", str(saved), "--output_folder", str(out)]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
        if done.returncode:
            shutil.rmtree(out, ignore_errors=True)


def _train_to_end(work: Path, run_dir: Path, stage: int, precision: str) -> Any:
    """Train to the last step, from the newest checkpoint of the run folder if it has one, and return the run."""
    from pretrain.config import PretrainConfig
    from pretrain.configfile import load_config
    from pretrain.run import open_run
    from pretrain.stop_signal import StopSignal
    from pretrain.train import train_with_tracking

    overrides = [f"run_dir={run_dir}", f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    with open_run(load_config(PretrainConfig, work / "config.yaml", overrides).config) as run:
        train_with_tracking(run, "", StopSignal())
        return run


def _load_with_deepspeed(engine: Any, folder: Path, ours: Path) -> str:
    """Load a checkpoint with DeepSpeed and compare all ranks' weights and moments with our checkpoint of the same step.

    Args:
        engine: DeepSpeed engine to load into.
        folder: Folder of DeepSpeed's checkpoint.
        ours: Folder of our checkpoint.

    Returns:
        What is wrong, or an empty string if the values are equal on every rank.
    """
    from pretrain import distributed
    from pretrain.checkpoint.manifest import Manifest
    from pretrain.checkpoint.pieces import Reader
    from pretrain.engine.partitions import local_fragments

    if not folder.exists():
        return "not converted"
    for fragment in local_fragments(engine):  # they may already hold the same values
        for kind in fragment.kinds:
            fragment.view(kind).zero_()
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=TAG)
        problem = "" if path else "nothing loaded"
    except Exception as error:
        problem = type(error).__name__
    if not any(distributed.gather(problem)):
        reader = Reader(ours, Manifest.load(ours))
        for fragment in local_fragments(engine):
            for kind in fragment.kinds:
                expected = torch.empty(fragment.numel)
                reader.read_into(expected, fragment.name, fragment.start, kind)
                problem = problem if torch.equal(expected, fragment.view(kind)) else "wrong values without an error"
    return next(filter(None, distributed.gather(problem)), "")


def launch(work: Path, world_size: int, task: str, precision: str, grid: Grid) -> None:
    """Run a task on `world_size` ranks, and exit with an error if it fails; a timeout kills all ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    command += [__file__, "--task", task, "--work", str(work), "--precision", precision]
    command += ["--world-sizes", *map(str, grid.world_sizes), "--stages", *map(str, grid.stages)]
    with (work / f"{task}-{world_size}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code = process.wait(timeout=LAUNCH_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        sys.exit(f"{task} on {world_size} ranks failed:\n{(work / f'{task}-{world_size}.log').read_text()[-3000:]}")


def losses(run_dir: Path) -> list[float]:
    """Return the losses of the steps after the saved one."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if row["step"] > SAVED_AT and "train/loss" in row]


def compare(work: Path, precision: str, grid: Grid) -> None:
    """Print how many combinations resume correctly, and the largest difference of their losses."""
    names = grid.names()
    uninterrupted = {name: losses(work / name) for name in names}
    steps = list(zip(*uninterrupted.values(), strict=True))
    spread = max((max(step) - min(step)) / min(step) for step in steps)
    largest, num_correct = 0.0, 0
    for source in names:
        for target in names:
            found = losses(work / "resumed" / f"{source} to {target}")
            difference = max(abs(a - b) / b for a, b in zip(found, uninterrupted[source], strict=True))
            largest = max(largest, difference)
            num_correct += difference <= (1e-5 if precision == "fp32" else spread)
    bar = "1e-5" if precision == "fp32" else f"{spread:.1e}, the spread of uninterrupted runs"
    total = len(names) ** 2
    num_losses = STEPS - SAVED_AT
    print(f"{precision}: {num_correct} of {total} combinations resume with the next {num_losses} losses within {bar}")
    print(f"largest relative difference from an uninterrupted run: {largest:.1e}; spread of these runs: {spread:.1e}")
    problems_by_size = [
        json.loads((work / f"deepspeed-{world_size}.json").read_text()) for world_size in grid.world_sizes
    ]
    for loader in LOADERS:
        problems = [problem for each in problems_by_size for problem in each[loader].values()]
        print(f"DeepSpeed's {loader}: {problems.count('')} of {total} hold the saved weights and moments bit for bit")
        for problem in sorted(set(problems) - {""}):
            print(f"  {problems.count(problem)} x {problem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="training precision")
    parser.add_argument("--task", choices=["train", "convert", "load"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of ranks")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages")
    arguments = parser.parse_args()
    grid = Grid(arguments.world_sizes, arguments.stages)
    if arguments.task:
        from pretrain.distributed import leave_process_group
        from pretrain.engine.deepspeed import start_distributed

        start_distributed()
        task = {"train": train_all, "convert": convert_all, "load": load_all}[arguments.task]
        task(arguments.work, arguments.precision, grid)
        leave_process_group()
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = keep_classes(list_digits(), ["0", "1", "2"])
        make_shards(source, work / "shards", ShardOptions(validation_fraction=0.0, shard_bytes=50_000, seed=0))
        (work / "config.yaml").write_text(CONFIG.format(shards=work / "shards", steps=STEPS, saved_at=SAVED_AT))
        for task, world_sizes in (("train", grid.world_sizes), ("convert", [1]), ("load", grid.world_sizes)):
            for world_size in world_sizes:
                launch(work, world_size, task, arguments.precision, grid)
        compare(work, arguments.precision, grid)


if __name__ == "__main__":
    main()
