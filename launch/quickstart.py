"""Run all stages on a laptop, command by command: digits -> shards -> pretraining -> export -> fine-tuning.

A masked autoencoder is pretrained on images without labels. Then a classifier learns the digits 5 to 9 from two labels
per digit, once from the pretrained model and once from scratch. Both are tested on images that no stage has seen.
`make quickstart` runs this script.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from launch.launchers import list_gpus

BIN = Path(sys.executable).parent
RUNS = Path("runs")
SHARDS = RUNS / "quickstart-shards"
IMAGES = RUNS / "quickstart-images"
PRETRAINED, FINETUNED, FROM_SCRATCH = (
    RUNS / "quickstart",
    RUNS / "quickstart-finetune",
    RUNS / "quickstart-from-scratch",
)
TEST_IMAGES = [IMAGES / f"a-{digit}.png" for digit in range(5, 10)]
STEP_SECONDS = 1200
NUM_RANKS = 2


def main() -> int:
    """Run all steps; return 0, or the exit code of the first step that fails."""
    os.chdir(ROOT)
    for folder in (SHARDS, IMAGES, PRETRAINED, FINETUNED, FROM_SCRATCH):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    for title, command in steps():
        if "predict" in command:
            extract_images()
        code = run(title, command)
        if code:
            print(f"\nthis command failed with exit code {code}:\n  {shlex.join(command)}", file=sys.stderr)
            return code
    summarize(time.monotonic() - started)
    return 0


def steps() -> list[tuple[str, list[str]]]:
    """Return the title and the command of each step, as a user would type it."""
    make = ["vitrail", "shards", "make", "digits"]
    finetune = ["python", "launch/finetune.py", "--config", "configs/quickstart/finetune.yaml"]
    ranks = str(min(len(list_gpus()), NUM_RANKS) or NUM_RANKS)  # without GPUs, both ranks run on the CPU
    return [
        (
            "Make shards of the digits 0 to 4",
            [*make, str(SHARDS / "pretrain"), "--classes", "0,1,2,3,4", "--shard-size", "64kB"],
        ),
        (
            "Make shards of the digits 5 to 9, half of them for testing",
            [*make, str(SHARDS / "finetune"), "--classes", "5,6,7,8,9", "--shard-size", "64kB", "--validation", "0.5"],
        ),
        (
            f"Pretrain a masked autoencoder on all of them, without labels, with DeepSpeed ZeRO on {ranks} ranks",
            [
                "deepspeed",
                "--quiet",
                "--num_gpus",
                ranks,
                "launch/pretrain.py",
                "--config",
                "configs/quickstart/pretrain.yaml",
            ],
        ),
        (
            "Export the checkpoint as a Hugging Face folder",
            ["vitrail", "export", str(PRETRAINED), str(PRETRAINED / "export")],
        ),
        ("Fine-tune it on two labels for each of the digits 5 to 9", finetune),
        (
            "Train the same network from scratch on the same labels",
            [*finetune, "from_scratch=true", f"run_dir={FROM_SCRATCH}"],
        ),
        (
            "Classify one test image per class; each file is named after its true class",
            ["vitrail", "predict", str(FINETUNED / "model"), *(str(image) for image in TEST_IMAGES)],
        ),
    ]


def run(title: str, command: list[str]) -> int:
    """Run one step and return its exit code.

    After STEP_SECONDS or Ctrl-C, all processes of the step are ended and the exit code is 1.

    Args:
        title: Heading to print.
        command: Words of the command.
    """
    print(f"\n\033[1m{title}\033[0m\n$ {shlex.join(command)}", flush=True)
    environment = {
        **os.environ,
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    if not list_gpus():
        environment["DS_ACCELERATOR"] = "cpu"
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(STEP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        cause = f"no end after {STEP_SECONDS} s" if isinstance(reason, subprocess.TimeoutExpired) else "interrupted"
        print(f"\n{cause}", file=sys.stderr)
        return 1
    print(f"({time.monotonic() - started:.0f} s)", flush=True)
    return code


def summarize(seconds: float) -> None:
    """Print the results and where to find the outputs.

    Args:
        seconds: Duration of all steps.
    """
    mlflow = f"{os.path.relpath(BIN)}/mlflow ui --backend-store-uri {store_uri()}"
    lines = {
        "fine-tuned from pretraining": f"top-1 {last_top1(FINETUNED):.1%}  (two labels per class, 448 test images)",
        "same network from scratch": f"top-1 {last_top1(FROM_SCRATCH):.1%}",
        "reconstructed images": PRETRAINED / "pictures",
        "Hugging Face folder": FINETUNED / "model",
        "all metrics": mlflow,
    }
    print(f"\n\033[1mDone in {seconds / 60:.1f} minutes\033[0m")
    for name, value in lines.items():
        print(f"  {name:<38}{value}")


def last_top1(run_dir: Path) -> float:
    """Return the top-1 accuracy after the last epoch; choosing the best epoch would use the test set for selection."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float([row["validation/top1"] for row in rows if "validation/top1" in row][-1])


def extract_images() -> None:
    """Extract the first test image of each class from the test shards."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for tar in sorted((SHARDS / "finetune" / "validation").glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                image = IMAGES / f"a-{member.name.partition('/')[0]}.png"
                content = archive.extractfile(member)
                if member.name.endswith(".png") and image in TEST_IMAGES and not image.exists() and content:
                    image.write_bytes(content.read())


def store_uri() -> str:
    """Return the URI of the MLflow store that all runs share."""
    return f"sqlite:///{(RUNS / 'mlflow.db').resolve()}"


if __name__ == "__main__":
    sys.exit(main())
