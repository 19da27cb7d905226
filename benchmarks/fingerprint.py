"""Record what training computes, so that a refactor can show that it computes the same, bit for bit.

Trains the quickstart's three recipes for 50 steps on 1 and 2 ranks at ZeRO stages 0 to 3, and records each step's loss,
gradient norm and position in the data, each evaluation, and a hash of every micro-batch's pixels and sample positions.
Run it in a checkout before the change and in one after it, on the same machine:

    python benchmarks/fingerprint.py before.json
    python benchmarks/fingerprint.py after.json --compare before.json
    python benchmarks/fingerprint.py after.json --compare before.json --tolerance 1e-6    # sums in another order

Exits with code 1 if a batch differs, or a metric by more than the tolerance. Takes about ten minutes on 2 CPU cores.
"""

import argparse
import hashlib
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 600
STEPS = ["schedule.total_steps=50", "schedule.warmup_steps=10", "logging.every_steps=1", "evaluation.every_steps=25"]
STEPS += ["data.num_workers=0", "tracking.uri=off"]
PROBES = ["evaluation.probe_every_steps=25", "evaluation.probe_samples=100"]
RECIPES = {  # recipe -> overrides, ZeRO stages that it supports
    "supervised": (["ema.decay=0.9"], range(4)),
    "pretrain": (["ema.decay=0.9"], range(4)),  # the masked autoencoder
    "self_distillation": ([], range(3)),
}
TIMED = ("time", "speed/", "probe/seconds", "data/wait_fraction", "data/batches_ready", "data/megabytes", "_busy")
HASHES = "FINGERPRINT_FOLDER"  # environment variable that makes this script a rank


def run_rank(folder: Path) -> None:
    """Run launch/pretrain.py as this rank and hash every batch that enters the engine."""
    from deepspeed import DeepSpeedEngine  # only ranks need it

    forward = DeepSpeedEngine.forward
    digest = hashlib.sha256()

    def hashing(engine: Any, batch: Any, *args: Any, **options: Any) -> Any:
        crops = [batch.get(name, {}).get("image") for name in ("global_crops", "local_crops")]
        for tensor in (crops[0], batch.get("image"), batch["position"], crops[1]):
            if tensor is not None:
                digest.update(tensor.detach().cpu().numpy().tobytes())
        return forward(engine, batch, *args, **options)

    DeepSpeedEngine.forward = hashing
    script = ROOT / "launch" / "pretrain.py"
    sys.argv[0] = str(script)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        (folder / f"rank-{os.environ.get('RANK', '0')}.sha256").write_text(digest.hexdigest())


def record(recipe: str, overrides: list[str], world_size: int, folder: Path) -> dict[str, Any]:
    """Train one recipe and return its rows of metrics and the hash of each rank's batches."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    config = ["--config", str(ROOT / "configs" / "quickstart" / f"{recipe}.yaml")]
    command = [sys.executable, *(launcher if world_size > 1 else []), __file__, *config, *overrides]
    environment = {**os.environ, HASHES: str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PYTHONWARNINGS"] = "ignore"
    subprocess.run(command, env=environment, cwd=folder, check=True, timeout=TIMEOUT_SECONDS, stdout=subprocess.DEVNULL)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        {name: value for name, value in json.loads(line).items() if not any(part in name for part in TIMED)}
        for line in lines
    ]
    return {"rows": rows, "batches": [path.read_text() for path in sorted(folder.glob("*.sha256"))]}


def make_shards(folder: Path) -> None:
    """Write the quickstart's shards into `folder`."""
    program = "import sys; from launch.cli import main; sys.argv[0] = 'shards'; main()"
    for name, classes, more in (
        ("pretrain", "0,1,2,3,4", []),
        ("finetune", "5,6,7,8,9", ["--validation", "0.5"]),
    ):
        out = str(folder / "runs" / "quickstart-shards" / name)
        command = ["shards", "make", "digits", out, "--classes", classes, "--shard-size", "64kB", *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", program, *command], env=environment, check=True, timeout=TIMEOUT_SECONDS)


def main() -> int:
    """Record every setting and compare with an earlier record; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="record of another checkout to compare with")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="largest difference of a metric from the record, relative to its value if that is above 1",
    )
    parser.add_argument("--only", default="", help="record only the settings whose name contains this text")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        shards = Path(temporary)
        make_shards(shards)
        for recipe, (overrides, stages) in RECIPES.items():
            for stage in stages:
                for world_size in (1, 2):
                    name = f"{recipe}, ZeRO {stage}, {world_size} rank(s)"
                    if arguments.only not in name:
                        continue
                    folder = shards / name.replace(" ", "-")
                    folder.mkdir()
                    (folder / "runs").symlink_to(shards / "runs")
                    settings = [f"run_dir={folder / 'run'}", f"engine.zero_stage={stage}"]
                    found[name] = record(recipe, [*settings, *STEPS, *PROBES, *overrides], world_size, folder)
                    print(f"{name}: loss {found[name]['rows'][-2].get('train/loss')}", flush=True)
    arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if arguments.compare is None:
        return 0
    expected = json.loads(arguments.compare.read_text(encoding="utf-8"))
    distances = {name: distance(found[name], expected.get(name)) for name in found}
    differing = {name: value for name, value in distances.items() if value > arguments.tolerance}
    for name, value in differing.items():
        print(f"{name}: differs by {value:.1e}")
    within = f"within {arguments.tolerance:g}" if arguments.tolerance else "bit for bit"
    print(
        f"{len(found) - len(differing)} of {len(found)} settings are identical, {within}; "
        f"largest difference {max(distances.values()):.1e}"
    )
    return 1 if differing else 0


def distance(record: dict[str, Any], other: dict[str, Any] | None) -> float:
    """Return the largest difference of a metric between two records; infinite if they have other batches or metrics."""
    if other is None or record["batches"] != other["batches"] or len(record["rows"]) != len(other["rows"]):
        return math.inf
    largest = 0.0
    for row, other_row in zip(record["rows"], other["rows"], strict=True):
        if row.keys() != other_row.keys():
            return math.inf
        largest = max(largest, *(abs(row[name] - other_row[name]) / max(1.0, abs(row[name])) for name in row))
    return largest


if __name__ == "__main__":
    if HASHES in os.environ:
        run_rank(Path(os.environ[HASHES]))
    else:
        sys.exit(main())
