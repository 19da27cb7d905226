"""A whole training step: ours under DeepSpeed ZeRO-1, beside timm's and transformers' ViT in a plain torch loop.

Every contender sees the same images, loss, AdamW, clipping, micro-batch and accumulation, in a process of its own;
the rounds are interleaved and the median counts.

    make benchmark                                                        # small, on a CPU
    python benchmarks/train_step.py --model B/16 --micro-batch 256        # on a GPU
    python benchmarks/train_step.py --model B/16 --micro-batch 256 --accumulation 4 --json b16.json
    python benchmarks/train_step.py --profile "ours eager"                # where the time goes
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
from pretrain.model.vit import ViT, compile_blocks
from pretrain.objectives import build_objective

CLASSES = 1000
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
class Measured:
    """One contender in one round."""

    images_per_second: float
    peak_memory_gb: float


class Classifier(nn.Module):
    """Images and labels in, cross-entropy out: what each contender's step computes."""

    def __init__(self, logits: Callable[[Tensor], Tensor], owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.logits = logits

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(images).float(), labels)


def plain_loop(model: nn.Module) -> Step:
    """A torch training step as one writes it: bf16 autocast on a GPU, fused AdamW, clipping at 1."""
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


def build_timm(config: ModelConfig, *, compiled: bool, classes: int = CLASSES) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_classes=classes,
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
            num_labels=CLASSES,
        )
    )
    run = torch.compile(model) if compiled else model
    return Classifier(lambda images: run(images).logits, model)


def our_step(config: ModelConfig, micro_batch: int, accumulation: int, *, compiled: bool) -> Step:
    """Our step under DeepSpeed ZeRO-1, as `train.py` runs it."""
    start_distributed()
    objective = build_objective(SupervisedConfig(), ViT(config), [1 / CLASSES] * CLASSES, PreprocessingConfig())
    if compiled:
        compile_blocks(objective)
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
    """Build a contender; return its step."""
    torch.manual_seed(0)
    config = MODELS[model]
    whose, how = name.split()
    compiled = how == "compiled"
    if whose == "ours":
        step = our_step(config, micro_batch, accumulation, compiled=compiled)
    else:
        build = build_timm if whose == "timm" else build_transformers
        step = plain_loop(build(config, compiled=compiled))
    size = config.image_size
    batches = [
        (torch.randn(micro_batch, 3, size, size, device=DEVICE), torch.randint(CLASSES, (micro_batch,), device=DEVICE))
        for _ in range(accumulation)
    ]
    return lambda: step(batches)


def measure(step: Callable[[], None], images: int, steps: int, warmup: int) -> Measured:
    """Time a contender in this process."""
    for _ in range(warmup):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Measured(steps * images / seconds, peak / 1e9)


def profile(step: Callable[[], None], steps: int, warmup: int) -> None:
    """Print where the time of a contender goes."""
    for _ in range(warmup):
        step()
    with torch.profiler.profile() as seen:
        for _ in range(steps):
            step()
        wait()
    order = f"self_{DEVICE.type}_time_total"
    print(f"{steps} steps\n{seen.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50)}")


def matmul_peak() -> float:
    """Return the FLOP/s that a large matrix product reaches here: bf16 on a GPU, fp32 on a CPU."""
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
    """Return the FLOPs of forward and backward: 3 times the products of the forward pass."""
    width, depth, tokens = config.hidden_size, config.num_hidden_layers, config.num_patches + 1
    block = tokens * (4 * width**2 + 2 * width * config.mlp_size) + 2 * tokens**2 * width
    ends = config.num_patches * 3 * config.patch_size**2 * width + width * CLASSES
    return 3 * 2 * (depth * block + ends)


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="B/16" if ON_GPU else "Ti/8 at 64")
    parser.add_argument("--micro-batch", type=int, default=256 if ON_GPU else 16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=10 if ON_GPU else 3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--json", type=Path, help="write the figures here, for machines")
    parser.add_argument("--profile", choices=CONTENDERS, help="show where the time of one goes, instead")
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
    seen: dict[str, list[Measured]] = {name: [] for name in arguments.contenders}
    for _ in range(arguments.rounds):
        for name in arguments.contenders:
            seen[name].append(in_own_process(name, sys.argv[1:]))
            print(f"{name}: {seen[name][-1].images_per_second:.0f} images/s", file=sys.stderr, flush=True)
    report(arguments, peak, seen)


def in_own_process(name: str, arguments: list[str]) -> Measured:
    """Measure a contender where no other has left anything behind."""
    command = [sys.executable, __file__, *arguments, "--one", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_SECONDS)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def report(arguments: argparse.Namespace, peak: float, seen: dict[str, list[Measured]]) -> None:
    """Print a table, and write the figures if asked."""
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    medians = {name: statistics.median(m.images_per_second for m in rounds) for name, rounds in seen.items()}
    print(
        f"{arguments.model}, micro-batch {arguments.micro_batch} x {arguments.accumulation}, "
        f"{'bf16' if ON_GPU else 'fp32'}, {where}, torch {torch.__version__}, matmul peak {peak / 1e12:.2f} TFLOP/s\n"
    )
    print(f"| | images/s (lowest, highest) | of {BASELINE} | of the matmul peak | peak memory |\n|---|---|---|---|---|")
    flops = flops_per_image(MODELS[arguments.model])
    for name, rounds in seen.items():
        speeds = [m.images_per_second for m in rounds]
        ratio = f"{medians[name] / medians[BASELINE]:.2f}x" if BASELINE in medians else ""
        print(
            f"| {name} | {medians[name]:.1f} ({min(speeds):.1f}, {max(speeds):.1f}) | {ratio} | "
            f"{medians[name] * flops / peak:.0%} | {max(m.peak_memory_gb for m in rounds):.2f} GB |"
        )
    if arguments.json:
        figures = {name: [asdict(m) for m in rounds] for name, rounds in seen.items()}
        settings = {
            key: value for key, value in vars(arguments).items() if key not in ("json", "one", "profile", "contenders")
        }
        content = {"settings": settings, "device": where, "matmul_peak": peak, "figures": figures}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
