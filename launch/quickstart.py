"""The whole way on a laptop, command by command: digits -> shards -> pretraining -> export -> fine-tuning.

A masked autoencoder is pretrained on images without labels. Then the digits 5 to 9 are learned from two labels each,
once from the pretrained model and once from scratch, and measured on images that no stage has seen. Started by `make
quickstart`.
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
BIN = Path(sys.executable).parent
RUNS = Path("runs")
SHARDS = RUNS / "quickstart-shards"
IMAGES = RUNS / "quickstart-images"
RUN, FINETUNED, TWIN = RUNS / "quickstart", RUNS / "quickstart-finetune", RUNS / "quickstart-from-scratch"
PREDICTED = [IMAGES / f"a-{digit}.png" for digit in range(5, 10)]
STEP_SECONDS = 1200
CPU_RANKS = 2


def main() -> int:
    """Run every step; return the exit code of the first that fails, else 0."""
    os.chdir(ROOT)
    for folder in (SHARDS, IMAGES, RUN, FINETUNED, TWIN):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    for title, command in steps():
        if "predict" in command:
            extract_images()
        code = run(title, command)
        if code:
            print(f"\nstopped: this command failed with exit code {code}:\n  {shlex.join(command)}", file=sys.stderr)
            return code
    summarize(time.monotonic() - started)
    return 0


def steps() -> list[tuple[str, list[str]]]:
    """Return each step's title and command, as a user would type it."""
    make = ["vitrail", "shards", "make", "digits"]
    finetune = ["python", "launch/finetune.py", "--config", "configs/quickstart/finetune.yaml"]
    ranks = str(min(count_gpus(), CPU_RANKS) or CPU_RANKS)
    return [
        (
            "Shards of the digits 0 to 4",
            [*make, str(SHARDS / "pretrain"), "--classes", "0,1,2,3,4", "--shard-size", "64kB"],
        ),
        (
            "Shards of the digits 5 to 9, half of them for testing",
            [*make, str(SHARDS / "finetune"), "--classes", "5,6,7,8,9", "--shard-size", "64kB", "--validation", "0.5"],
        ),
        (
            f"Pretrain a masked autoencoder on both, without labels, under DeepSpeed ZeRO on {ranks} ranks",
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
        ("Export the checkpoint as a Hugging Face folder", ["vitrail", "export", str(RUN), str(RUN / "export")]),
        ("Fine-tune it on two labels of each of the digits 5 to 9", finetune),
        (
            "Train its twin from scratch on the same labels",
            [*finetune, "from_scratch=true", f"run_dir={TWIN}"],
        ),
        (
            "Classify a test image of each class; the files are named by the truth",
            ["vitrail", "predict", str(FINETUNED / "model"), *(str(image) for image in PREDICTED)],
        ),
    ]


def run(title: str, command: list[str]) -> int:
    """Run one step; end all of its processes when it takes too long or Ctrl-C is pressed."""
    print(f"\n\033[1m{title}\033[0m\n$ {shlex.join(command)}", flush=True)
    environment = {
        **os.environ,
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    if not count_gpus():
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
        print(f"\nended: {type(reason).__name__}", file=sys.stderr)
        return 1
    print(f"({time.monotonic() - started:.0f} s)", flush=True)
    return code


def summarize(seconds: float) -> None:
    """Print what came out, and where to look next."""
    model = FINETUNED / "model"
    few = "two labels a class, 448 test images"
    print(f"\n\033[1mDone in {seconds / 60:.1f} minutes\033[0m")
    print(f"  fine-tuned from the pretrained model  top-1 {last_top1(FINETUNED):.1%}  ({few})")
    print(f"  the same network from scratch         top-1 {last_top1(TWIN):.1%}  (the same)")
    print(f"  what it rebuilds                      {RUN / 'pictures'}")
    print(f"  Hugging Face folder                   {model}")
    print(f"  every curve                           {os.path.relpath(BIN)}/mlflow ui --backend-store-uri {store()}")


def last_top1(run_dir: Path) -> float:
    """Return the top-1 after the last epoch, a run's one evaluation: choosing the best would peek at the test set."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float([row["validation/top1"] for row in rows if "validation/top1" in row][-1])


def extract_images() -> None:
    """Take the first image of each class to be predicted out of the test shards."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for tar in sorted((SHARDS / "finetune" / "validation").glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                image = IMAGES / f"a-{member.name.partition('/')[0]}.png"
                content = archive.extractfile(member)
                if member.name.endswith(".png") and image in PREDICTED and not image.exists() and content:
                    image.write_bytes(content.read())


def store() -> str:
    """Return the MLflow store that the runs share."""
    return f"sqlite:///{(RUNS / 'mlflow.db').resolve()}"


def count_gpus() -> int:
    """Return how many NVIDIA GPUs the driver lists."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
