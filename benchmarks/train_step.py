"""Measure a training step: ours under DeepSpeed ZeRO-1, compared with timm and transformers in a plain torch loop.

All contenders use the same image size, loss, AdamW, clipping, micro-batch size and accumulation. Each runs in its own
process. Contenders alternate, and the median of the rounds is reported.

    make benchmark                                                        # a small model on a CPU
    python benchmarks/train_step.py --model B/16 --micro-batch 256        # on a GPU
    python benchmarks/train_step.py --model B/16 --micro-batch 256 --accumulation 4 --json b16.json
    python benchmarks/train_step.py --profile "ours eager"                # print a profile
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import EngineConfig, ModelConfig, OptimizerConfig, PreprocessingConfig, SupervisedConfig
from pretrain.engine.deepspeed import build_engine, start_distributed
from pretrain.model.compiling import compile_graphs
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective

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
TIMEOUT_SECONDS = 900
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

Step = Callable[[list[tuple[Tensor, Tensor]]], None]


@dataclass(frozen=True)
class Measurement:
    """Result of one contender in one round.

    Attributes:
        images_per_second: Training speed.
        peak_memory_gb: Peak memory in GB: allocated on the GPU, or resident on a CPU.
    """

    images_per_second: float
    peak_memory_gb: float


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


def our_step(config: ModelConfig, micro_batch: int, accumulation: int, *, compiled: bool) -> Step:
    """Build our training step under DeepSpeed ZeRO-1, like the one in `pretrain/train.py`."""
    start_distributed()
    objective = build_objective(SupervisedConfig(), ViT(config), [1 / NUM_CLASSES] * NUM_CLASSES, PreprocessingConfig())
    if compiled:
        compile_graphs(objective)
    engine = build_engine(
        Classifier(objective.logits, objective),
        EngineConfig(
            zero_stage=1,
            precision="bf16" if ON_GPU else "fp32",
            global_batch_size=micro_batch * accumulation,
            micro_batch_size=micro_batch,
        ),
        OptimizerConfig(),
    )
    engine.train()

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        for images, labels in batches:
            engine.backward(engine(images, labels))
            engine.step()

    return step


def prepare(name: str, model: str, micro_batch: int, accumulation: int) -> Callable[[], None]:
    """Build a contender and random inputs, and return its training step."""
    torch.manual_seed(0)
    config = MODELS[model]
    library, mode = name.split()
    compiled = mode == "compiled"
    if library == "ours":
        step = our_step(config, micro_batch, accumulation, compiled=compiled)
    else:
        build = build_timm if library == "timm" else build_transformers
        step = plain_loop(build(config, compiled=compiled))
    size = config.image_size
    batches = [
        (
            torch.randn(micro_batch, 3, size, size, device=DEVICE),
            torch.randint(NUM_CLASSES, (micro_batch,), device=DEVICE),
        )
        for _ in range(accumulation)
    ]
    return lambda: step(batches)


def measure(step: Callable[[], None], images: int, steps: int, warmup: int) -> Measurement:
    """Measure a contender in this process; `images` is the number of images per step."""
    for _ in range(warmup):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Measurement(steps * images / seconds, peak / 1e9)


def profile(step: Callable[[], None], steps: int, warmup: int) -> None:
    """Print the 25 operations in which a contender spends most time."""
    for _ in range(warmup):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
        wait()
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


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="B/16" if ON_GPU else "Ti/8 at 64", help="size of the ViT")
    parser.add_argument(
        "--micro-batch", type=int, default=256 if ON_GPU else 16, help="number of images per micro-batch"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="number of micro-batches per step")
    parser.add_argument("--steps", type=int, default=30, help="number of measured steps per round")
    parser.add_argument(
        "--warmup", type=int, default=10 if ON_GPU else 3, help="number of steps before the measurement"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds per contender; the median is reported")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="contenders to measure")
    parser.add_argument("--json", type=Path, help="JSON file for the measurements")
    parser.add_argument("--profile", choices=CONTENDERS, help="only print the profile of this contender")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if name := arguments.one or arguments.profile:
        step = prepare(name, arguments.model, arguments.micro_batch, arguments.accumulation)
        if arguments.profile:
            profile(step, arguments.steps, arguments.warmup)
        else:
            images = arguments.micro_batch * arguments.accumulation
            print(json.dumps(asdict(measure(step, images, arguments.steps, arguments.warmup))))
        return

    peak = matmul_peak()
    measurements: dict[str, list[Measurement]] = {name: [] for name in arguments.contenders}
    for _ in range(arguments.rounds):
        for name in arguments.contenders:
            measurements[name].append(measure_in_process(name, sys.argv[1:]))
            print(f"{name}: {measurements[name][-1].images_per_second:.0f} images/s", file=sys.stderr, flush=True)
    report(arguments, peak, measurements)


def measure_in_process(name: str, arguments: list[str]) -> Measurement:
    """Measure a contender in a new process, so that contenders cannot influence each other."""
    command = [sys.executable, __file__, *arguments, "--one", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_SECONDS)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def report(arguments: argparse.Namespace, peak: float, measurements: dict[str, list[Measurement]]) -> None:
    """Print the table, and write the JSON file if one was requested."""
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    medians = {name: statistics.median(m.images_per_second for m in rounds) for name, rounds in measurements.items()}
    print(
        f"{arguments.model}, micro-batch {arguments.micro_batch} x {arguments.accumulation}, "
        f"{'bf16' if ON_GPU else 'fp32'}, {where}, torch {torch.__version__}, matmul peak {peak / 1e12:.2f} TFLOP/s\n"
    )
    print(
        f"| | images/s (lowest, highest) | relative to {BASELINE} | share of the matmul peak | peak memory |\n"
        "|---|---|---|---|---|"
    )
    flops = flops_per_image(MODELS[arguments.model])
    for name, rounds in measurements.items():
        speeds = [m.images_per_second for m in rounds]
        ratio = f"{medians[name] / medians[BASELINE]:.2f}x" if BASELINE in medians else ""
        print(
            f"| {name} | {medians[name]:.1f} ({min(speeds):.1f}, {max(speeds):.1f}) | {ratio} | "
            f"{medians[name] * flops / peak:.0%} | {max(m.peak_memory_gb for m in rounds):.2f} GB |"
        )
    if arguments.json:
        figures = {name: [asdict(m) for m in rounds] for name, rounds in measurements.items()}
        settings = {
            key: value for key, value in vars(arguments).items() if key not in ("json", "one", "profile", "contenders")
        }
        content = {"settings": settings, "device": where, "matmul_peak": peak, "figures": figures}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
