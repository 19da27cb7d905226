"""Measure a training step: the project's own loop, compared with timm and transformers in a plain torch loop.

All contenders use the same image size, loss, AdamW, clipping, micro-batch size and accumulation. Ours has all that a
real run has, on random images: `pretrain.train.train` copies them to the device and augments them, and its steps
include the guard against bad steps, the reduction, the moving average of the weights and the heartbeats. The others are
given normalized images that are on the device already, and do nothing else.

Each contender runs in a process of its own, with the same environment: the same number of threads, which sleep while
they wait for each other (OMP_WAIT_POLICY=passive). Contenders alternate, and the median of the rounds is reported. A
contender that fails has a row that says why, and the others go on; the exit code is 1 only if ours fails.

    make benchmark                                                        # a small model on a CPU
    python benchmarks/train_step.py --quick                               # compiled contenders, within ten minutes
    python benchmarks/train_step.py --model B/16 --micro-batch 256        # on a GPU
    python benchmarks/train_step.py --model B/16 --micro-batch 256 --accumulation 4 --json b16.json
    python benchmarks/train_step.py --profile "ours eager"                # print a profile
    python benchmarks/train_step.py --host-time                           # what the host needs for our step
"""

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.recording import DEVICE, ON_GPU, Measurement, Recorder, StepActions, wait
from benchmarks.synthetic import open_synthetic_run, synthetic_config, train_synthetic
from pretrain.config import ModelConfig, SupervisedConfig
from pretrain.cores import available_cores
from pretrain.engine.deepspeed import start_distributed

NUM_CLASSES = 1000
MODELS = {
    "Ti/8 at 64": ModelConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, patch_size=8, image_size=64
    ),
    "S/16": ModelConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
    "B/16": ModelConfig(),
    "L/16": ModelConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}
CONTENDERS = (
    "timm eager",
    "timm compiled",
    "transformers eager",
    "transformers compiled",
    "ours eager",
    "ours compiled",
)
BASELINE = "timm compiled"
SPEED = "images/s (lowest, highest)"  # name of the first column
TIMEOUT_SECONDS = 900.0
QUICK_SECONDS = 480.0  # from then on, no contender is waited for
QUICK = {"rounds": 2, "steps": 20, "contenders": [BASELINE, "ours compiled", "transformers compiled"]}
# For the time of the host: 200 trained tensors as in a ViT-B/16, so small that the arithmetic takes next to no time.
NARROW = ModelConfig(hidden_size=32, num_hidden_layers=12, num_attention_heads=2, patch_size=8, image_size=32)

Step = Callable[[list[tuple[Tensor, Tensor]]], None]


@dataclass
class Result:
    """Rounds of one contender, and the reason if it failed."""

    rounds: list[Measurement] = field(default_factory=list)
    failure: str = ""

    @property
    def speeds(self) -> list[float]:
        """Images per second of each round."""
        return [measurement.images_per_second for measurement in self.rounds]

    @property
    def latest(self) -> str:
        """What is printed after a round."""
        return f"failed: {self.failure}" if self.failure else f"{self.speeds[-1]:.1f} images/s"


class Classifier(nn.Module):
    """Return the cross-entropy for images and labels.

    Args:
        logits: Function that predicts the logits of images.
        owner: Module whose parameters `logits` uses.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.logits = logits

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(images).float(), labels)


def plain_loop(model: nn.Module) -> Step:
    """Build a plain torch training step: bf16 autocast on a GPU, fused AdamW, clipping at 1."""
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        for images, labels in batches:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
                loss = model(images, labels)
            (loss / len(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_timm(config: ModelConfig, *, compiled: bool, num_classes: int = NUM_CLASSES) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_classes=num_classes,
    )
    return Classifier(torch.compile(model) if compiled else model, model)


def build_transformers(config: ModelConfig, *, compiled: bool) -> nn.Module:
    import transformers

    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.mlp_size,
            patch_size=config.patch_size,
            image_size=config.image_size,
            num_labels=NUM_CLASSES,
        )
    )
    run = torch.compile(model) if compiled else model
    return Classifier(lambda images: run(images).logits, model)


def default_precision() -> Literal["bf16", "fp32"]:
    """Return the precision of all contenders on this device."""
    return "bf16" if ON_GPU else "fp32"


def take_steps(step: Callable[[], None], progress: StepActions) -> None:
    """Take the steps of a plain loop, and report the end of each."""
    for _ in range(progress.total_steps):
        step()
        progress.end_step()


def run_theirs(contender: str, model: ModelConfig, micro_batch: int, accumulation: int, progress: StepActions) -> None:
    """Train a model of timm or transformers on random images, which are normalized and on the device already."""
    torch.manual_seed(0)
    library, mode = contender.split()
    build = build_timm if library == "timm" else build_transformers
    step = plain_loop(build(model, compiled=mode == "compiled"))
    size = model.image_size
    batches = [
        (
            torch.randn(micro_batch, 3, size, size, device=DEVICE),
            torch.randint(NUM_CLASSES, (micro_batch,), device=DEVICE),
        )
        for _ in range(accumulation)
    ]
    take_steps(lambda: step(batches), progress)


def run_ours(
    contender: str,
    model: ModelConfig,
    micro_batch: int,
    accumulation: int,
    progress: StepActions,
    precision: Literal["bf16", "fp32"] | None = None,
) -> None:
    """Train with the project's own loop on random images in host memory, which it copies and augments."""
    start_distributed()
    with tempfile.TemporaryDirectory() as folder:
        config = synthetic_config(
            Path(folder) / "run",
            model,
            SupervisedConfig(),
            micro_batch_size=micro_batch,
            accumulation_steps=accumulation,
            total_steps=progress.total_steps,
            compiled=contender.endswith("compiled"),
            precision=precision or default_precision(),
        )
        with open_synthetic_run(config, NUM_CLASSES) as run:
            train_synthetic(run, progress)


def run_contender(arguments: argparse.Namespace, contender: str, progress: StepActions) -> None:
    run = run_ours if contender.startswith("ours") else run_theirs
    with redirect_stdout(sys.stderr):
        run(contender, MODELS[arguments.model], arguments.micro_batch, arguments.accumulation, progress)


def measure(arguments: argparse.Namespace, contender: str) -> Measurement:
    """Measure a contender in this process."""
    recorder = Recorder(arguments.micro_batch * arguments.accumulation, arguments.steps, arguments.warmup)
    run_contender(arguments, contender, recorder)
    return recorder.measurement()


def profile_contender(arguments: argparse.Namespace) -> None:
    """Print the profile of a contender."""
    profiler = torch.profiler.profile()

    def stop() -> None:
        wait()
        profiler.stop()

    end = arguments.warmup + arguments.steps
    actions = {arguments.warmup: profiler.start, end: stop}
    run_contender(arguments, arguments.profile, StepActions(end + 1, actions))
    print_profile(profiler, arguments.steps)


def profile(step: Callable[[], None], steps: int, warmup: int) -> None:
    """Print the 25 operations in which a step spends most time."""
    for _ in range(warmup):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
        wait()
    print_profile(profiler, steps)


def print_profile(profiler: torch.profiler.profile, steps: int) -> None:
    """Print the 25 operations that take most time."""
    order = f"self_{DEVICE.type}_time_total"
    print(f"{steps} steps\n{profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50)}")


def matmul_peak() -> float:
    """Return the highest measured FLOP/s of a large matrix product on this device: bf16 on a GPU, fp32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if ON_GPU else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        wait()
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        wait()
        best = max(best, 5 * 2 * n**3 / (time.perf_counter() - started))
    return best


def flops_per_image(config: ModelConfig) -> float:
    """Return the FLOPs per image of the forward and backward pass: 3 times the matrix products of the forward pass."""
    width, depth, tokens = config.hidden_size, config.num_hidden_layers, config.num_patches + 1
    block = tokens * (4 * width**2 + 2 * width * config.mlp_size) + 2 * tokens**2 * width
    ends = config.num_patches * 3 * config.patch_size**2 * width + width * NUM_CLASSES
    return 3 * 2 * (depth * block + ends)


def parse_arguments(values: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; with --quick, fewer steps, rounds and contenders are the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="B/16" if ON_GPU else "Ti/8 at 64", help="size of the ViT")
    parser.add_argument(
        "--micro-batch", type=positive, default=256 if ON_GPU else 16, help="number of images per micro-batch"
    )
    parser.add_argument("--accumulation", type=positive, default=1, help="number of micro-batches per step")
    parser.add_argument("--steps", type=positive, default=30, help="number of measured steps per round")
    parser.add_argument(
        "--warmup",
        type=positive,
        default=10 if ON_GPU else 3,
        help="number of steps before the measurement, at least 1",
    )
    parser.add_argument("--rounds", type=positive, default=3, help="rounds per contender; the median is reported")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="contenders to measure")
    parser.add_argument("--json", type=Path, help="JSON file for the measurements")
    parser.add_argument(
        "--quick", action="store_true", help="end within ten minutes: only compiled contenders and few steps"
    )
    parser.add_argument(
        "--host-time", action="store_true", help="only print the host's time for our step, with next to no arithmetic"
    )
    parser.add_argument("--profile", choices=CONTENDERS, help="only print the profile of this contender")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    if "--quick" in (sys.argv[1:] if values is None else values):
        parser.set_defaults(**QUICK)
    return parser.parse_args(values)


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> int:
    arguments = parse_arguments()
    if arguments.one:
        print(json.dumps(asdict(measure(arguments, arguments.one))))
    elif arguments.profile:
        profile_contender(arguments)
    elif arguments.host_time:
        print_host_time(arguments)
    else:
        peak = matmul_peak()
        results = compare(arguments)
        print(describe(arguments, peak), table(arguments.model, peak, results), sep="\n\n")
        if arguments.json:
            write_json(arguments, peak, results)
        return any(name.startswith("ours") and result.failure for name, result in results.items())
    return 0


def compare(arguments: argparse.Namespace) -> dict[str, Result]:
    """Measure the contenders in turn, each in a process of its own; a contender that fails is not tried again."""
    results = {name: Result() for name in arguments.contenders}
    deadline = time.monotonic() + (QUICK_SECONDS if arguments.quick else math.inf)
    for _ in range(arguments.rounds):
        for name in (name for name, result in results.items() if not result.failure):
            measure_in_process(name, results[name], min(TIMEOUT_SECONDS, deadline - time.monotonic()))
            print(f"{name}: {results[name].latest}", file=sys.stderr, flush=True)
    return results


def measure_in_process(name: str, result: Result, timeout: float) -> None:
    """Measure a contender in a new process, and add the measurement or the failure to its result.

    Args:
        name: Name of the contender.
        result: Result of its earlier rounds.
        timeout: Seconds after which the process is ended. If there are earlier rounds, it has not failed by that.
    """
    try:
        code, out, errors = run_process(contender_command(name), timeout)
    except subprocess.TimeoutExpired:
        if not result.rounds:
            result.failure = f"no result after {timeout:.0f} s"
        return
    if code:
        result.failure = last_error(errors, code)
    else:
        result.rounds.append(Measurement(**json.loads(out.splitlines()[-1])))


def contender_command(name: str) -> list[str]:
    """Return the command that measures one contender with the options of this process."""
    return [sys.executable, __file__, *sys.argv[1:], "--one", name]


def environment() -> dict[str, str]:
    """Return the environment of every contender, with the same number of threads."""
    return {"OMP_NUM_THREADS": str(available_cores()), **os.environ}


def run_process(command: Sequence[str], timeout: float) -> tuple[int, str, str]:
    """Run a command and end all that it has started; return its exit code, output and errors.

    Raises:
        subprocess.TimeoutExpired: If it takes longer than `timeout` seconds.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=max(timeout, 1.0))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, out, errors


def last_error(errors: str, code: int) -> str:
    """Return the last line of a process's errors that names an exception, or else its last line."""
    lines = errors.strip().splitlines() or [f"exit code {code}"]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines)[-1].strip()


def print_host_time(arguments: argparse.Namespace) -> None:
    """Print the operations, the host's time and the host's waits of our step, with one thread and next to no work."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    recorder = Recorder(images=2, steps=arguments.steps, warmup=arguments.warmup)
    with redirect_stdout(sys.stderr):
        run_ours("ours eager", NARROW, 2, 1, recorder, precision="bf16")
    found = recorder.measurement()
    kernels = found.operations if found.kernels is None else found.kernels
    print(
        f"ours eager, bf16: {kernels} kernels, {found.step_milliseconds:.1f} ms of the host "
        f"({2 * found.cpu_milliseconds_per_image:.1f} ms of user time), {len(found.host_waits)} host waits"
    )


def describe(arguments: argparse.Namespace, peak: float) -> str:
    """Return the settings and the machine in one line; `peak` is the matmul peak in FLOP/s."""
    return (
        f"{arguments.model}, micro-batch {arguments.micro_batch} x {arguments.accumulation}, "
        f"{default_precision()}, {device_name()}, torch {torch.__version__}, "
        f"matmul peak {peak / 1e12:.2f} TFLOP/s"
    )


def device_name() -> str:
    return torch.cuda.get_device_name() if ON_GPU else f"CPU, {environment()['OMP_NUM_THREADS']} threads"


def table(model: str, peak: float, results: dict[str, Result]) -> str:
    """Return the measurements as a Markdown table; a contender that failed has the reason in its row."""
    done = {name: result for name, result in results.items() if not result.failure}
    medians = {name: statistics.median(result.speeds) for name, result in done.items()}
    rows = {
        name: cells(result.rounds, medians[name], medians.get(BASELINE), flops_per_image(MODELS[model]) / peak)
        for name, result in done.items()
    }
    columns = [column for column in next(iter(rows.values()), {}) if any(row[column] for row in rows.values())] or [
        SPEED
    ]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, result in results.items():
        values = [f"failed: {result.failure}", *[""] * (len(columns) - 1)]
        lines.append(
            "| " + " | ".join([name, *([rows[name][each] for each in columns] if name in rows else values)]) + " |"
        )
    return "\n".join(lines)


def cells(rounds: list[Measurement], median: float, baseline: float | None, seconds_at_peak: float) -> dict[str, str]:
    """Return the cells of a contender's row by the name of their column; a cell is empty if its value is unknown.

    Args:
        rounds: Measurements of the contender.
        median: Median of its images per second.
        baseline: The same of the baseline; None if it was not measured.
        seconds_at_peak: Seconds per image if all time were spent in matrix products at the device's peak.
    """
    last, speeds = rounds[-1], [each.images_per_second for each in rounds]
    cpu = statistics.median(each.cpu_milliseconds_per_image for each in rounds)
    joules = [each.joules_per_image for each in rounds if each.joules_per_image is not None]
    return {
        SPEED: f"{median:.1f} ({min(speeds):.1f}, {max(speeds):.1f})",
        f"relative to {BASELINE}": f"{median / baseline:.2f}x" if baseline else "",
        "share of the matmul peak": f"{median * seconds_at_peak:.0%}",
        "kernels per step": "" if last.kernels is None else str(last.kernels),
        "operations per step": str(last.operations) if last.kernels is None else "",
        "host waits per step": str(len(last.host_waits)),
        "peak memory": f"{max(each.peak_memory_gb for each in rounds):.2f} GB",
        "CPU time per image": "" if ON_GPU else f"{cpu:.1f} ms",
        "energy per image": f"{statistics.median(joules):.2f} J" if joules else "",
    }


def write_json(arguments: argparse.Namespace, peak: float, results: dict[str, Result]) -> None:
    """Write the settings, the measurements and the failures to the JSON file that was requested."""
    left_out = ("json", "one", "profile", "host_time", "contenders")
    content: dict[str, Any] = {
        "settings": {key: value for key, value in vars(arguments).items() if key not in left_out},
        "device": device_name(),
        "matmul_peak": peak,
        "figures": {name: [asdict(each) for each in result.rounds] for name, result in results.items()},
        "failures": {name: result.failure for name, result in results.items() if result.failure},
    }
    arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
