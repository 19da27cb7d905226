"""Every world size and ZeRO stage loads what every other has saved; DeepSpeed's own two ways beside.

    python benchmarks/reshard.py                        # fp32, world sizes 1 to 4 x stages 0 to 3: 256 ways
    python benchmarks/reshard.py --precision bf16
    python benchmarks/reshard.py --world-sizes 1 2 --stages 1      # the smallest run

A tiny ViT on scikit-learn's digits trains 14 steps at each world size and stage, saving at step 4. Then each of them
continues from each of those checkpoints, and its next 10 losses are compared with those of the run that never stopped.
One launch trains, and one loads, for each world size; the engines are built one after another inside it.

DeepSpeed's `load_checkpoint` is tried on what DeepSpeed saved, and on what its `ds_to_universal` made of that; a load
counts as right if this rank then holds, bit for bit, the weights and moments that were saved.
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
WAYS = {"load_checkpoint": "deepspeed", "ds_to_universal, then load_checkpoint": UNIVERSAL}
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
    """Topologies to save and to load at."""

    world_sizes: list[int]
    stages: list[int]

    def names(self) -> list[str]:
        """Return the name of each topology."""
        return [name_of(world_size, stage) for world_size in self.world_sizes for stage in self.stages]


def name_of(world_size: int, stage: int) -> str:
    """Name a topology."""
    return f"{world_size} ranks, stage {stage}"


def train_all(work: Path, precision: str, grid: Grid) -> None:
    """On every rank: train at each stage, from the beginning to the end, and save with DeepSpeed too."""
    from pretrain import distributed

    for stage in grid.stages:
        place = work / name_of(distributed.world_size(), stage)
        run = _continue(work, place, stage, precision)
        run.engine.save_checkpoint(str(work / "deepspeed" / place.name), tag="it")
        distributed.barrier()


def load_all(work: Path, precision: str, grid: Grid) -> None:
    """On every rank: continue at each stage from what each topology has saved; try DeepSpeed's loading too."""
    from pretrain import distributed

    theirs: dict[str, dict[str, str]] = {way: {} for way in WAYS}
    for stage in grid.stages:
        here = name_of(distributed.world_size(), stage)
        for source in grid.names():
            place = work / "continued" / f"{source} to {here}"
            if distributed.is_main():
                checkpoint = Path("checkpoints") / f"step-{SAVED_AT:08d}"
                shutil.copytree(work / source / checkpoint, place / checkpoint)
            distributed.barrier()
            run = _continue(work, place, stage, precision)
            for way, folder in WAYS.items():
                run.engine._config.load_universal_checkpoint = folder == UNIVERSAL
                saved = work / source / "checkpoints" / f"step-{STEPS:08d}"
                theirs[way][place.name] = _load_with_deepspeed(run.engine, work / folder / source, saved)
    if distributed.is_main():
        (work / f"deepspeed-{distributed.world_size()}.json").write_text(json.dumps(theirs))


def convert_all(work: Path, precision: str, grid: Grid) -> None:
    """Make universal checkpoints of DeepSpeed's, where it can."""
    from deepspeed.checkpoint import ds_to_universal

    for name in grid.names():
        there, out = work / "deepspeed" / name / "it", work / UNIVERSAL / name / "it"
        command = [sys.executable, ds_to_universal.__file__, "--inject_missing_state"]
        command += ["--input_folder", str(there), "--output_folder", str(out)]
        ended = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
        if ended.returncode:
            shutil.rmtree(out, ignore_errors=True)


def _continue(work: Path, run_dir: Path, stage: int, precision: str) -> Any:
    """Train to the last step from whatever is in a run folder."""
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
    """Return "" if DeepSpeed loads, on every rank, what `ours` holds, saved at the same moment; else what is wrong."""
    from pretrain import distributed
    from pretrain.checkpoint.manifest import Manifest
    from pretrain.checkpoint.pieces import Reader
    from pretrain.engine.partitions import local_fragments

    if not folder.exists():
        return "not converted"
    for fragment in local_fragments(engine):  # which may hold the very values already
        for kind in fragment.kinds:
            fragment.view(kind).zero_()
    try:
        path, _ = engine.load_checkpoint(str(folder), tag="it")
        problem = "" if path else "nothing loaded"
    except Exception as error:
        problem = type(error).__name__
    if not any(distributed.gather(problem)):
        reader = Reader(ours, Manifest.load(ours))
        for fragment in local_fragments(engine):
            for kind in fragment.kinds:
                there = torch.empty(fragment.numel)
                reader.read_into(there, fragment.name, fragment.start, kind)
                problem = problem if torch.equal(there, fragment.view(kind)) else "other values, without a word"
    return next((said for said in distributed.gather(problem) if said), "")


def launch(work: Path, world_size: int, task: str, precision: str, grid: Grid) -> None:
    """Run a task on so many ranks; all of them are ended if it takes too long."""
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
    """Return the losses of the steps after the one that was saved."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if row["step"] > SAVED_AT and "train/loss" in row]


def compare(work: Path, precision: str, grid: Grid) -> None:
    """Print how many of the ways are good, and how far the losses are apart."""
    names = grid.names()
    whole = {name: losses(work / name) for name in names}
    steps = list(zip(*whole.values(), strict=True))
    spread = max((max(step) - min(step)) / min(step) for step in steps)
    worst, good = 0.0, 0
    for source in names:
        for here in names:
            found = losses(work / "continued" / f"{source} to {here}")
            apart = max(abs(a - b) / b for a, b in zip(found, whole[source], strict=True))
            worst = max(worst, apart)
            good += apart <= (1e-5 if precision == "fp32" else spread)
    bar = "1e-5" if precision == "fp32" else f"{spread:.1e}, the spread of the unbroken runs"
    total = len(names) ** 2
    print(f"{precision}: {good} of {total} ways continue with the next {STEPS - SAVED_AT} losses within {bar}")
    print(f"farthest apart: {worst:.1e} relative; unbroken runs of other topologies: {spread:.1e}")
    theirs = [json.loads((work / f"deepspeed-{world_size}.json").read_text()) for world_size in grid.world_sizes]
    for way in WAYS:
        said = [problem for each in theirs for problem in each[way].values()]
        print(f"DeepSpeed's {way}: {said.count('')} of {total} are right")
        for problem in sorted(set(said) - {""}):
            print(f"  {said.count(problem)} x {problem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
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
