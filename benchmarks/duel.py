"""Train our objectives under DeepSpeed ZeRO-1, and those of transformers and timm in a plain torch loop.

Masked autoencoding is compared with transformers' `ViTMAEForPreTraining`, supervised learning with timm's
`VisionTransformer`. Both sides train on the same augmented digits in the same order, with the same masks, AdamW,
schedule and clipping, and start with the same weights (with `--own-weights`, each uses its own initialization). They
alternate every few steps, so that other work on the machine slows both down. The output is the mean loss of
the last tenth of the steps, over seeds, and the ratio of the images per second.

    python benchmarks/duel.py --objective mae
    python benchmarks/duel.py --objective supervised         # needs timm: pip install -r benchmarks/requirements.txt
    python benchmarks/duel.py --objective mae --model B/16 --batch 256 --steps 200 --compile           # on a GPU
    python benchmarks/duel.py --objective mae --model L/16 --batch 128 --steps 200 --compile           # on a GPU
    python benchmarks/duel.py --objective supervised --model B/16 --batch 256 --steps 200 --compile    # on a GPU
    python benchmarks/duel.py --objective mae --model B/16 --batch 256 --compile --profile ours        # profile

With `--results FILE`, an interrupted benchmark continues: seeds that the file contains are not measured again.
"""

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import Results, Row
from benchmarks.train_step import DEVICE, ON_GPU, Classifier, build_timm, profile, wait
from pretrain.config import (
    AugmentConfig,
    EngineConfig,
    MAEConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreprocessingConfig,
    SupervisedConfig,
)
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.loader import BatchPlan, training_batches
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.transforms.batch import Batch, augment, to_device
from pretrain.engine.deepspeed import build_engine, start_distributed
from pretrain.export.vit_mae import hub_mae_config
from pretrain.model.compiling import compile_graphs
from pretrain.model.hub_names import decoder_to_hub, encoder_to_hub
from pretrain.model.vit import ViT, sincos_positions
from pretrain.objectives import build_objective
from pretrain.objectives.mae import MAEObjective
from pretrain.objectives.objective import Objective
from pretrain.schedules import learning_rate_at, set_learning_rate

SMALL = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 4, "image_size": 24}
MODELS = {
    "small": ModelConfig(**SMALL),
    "B/16": ModelConfig(),
    "L/16": ModelConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}
POSITIONS = {"mae": "sincos", "supervised": "learned"}  # the same as transformers and timm use
SMALL_DECODER = MAEConfig(
    decoder_hidden_size=48,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=192,
    augment=AugmentConfig(crop_scale=(0.5, 1.0), flip=0.0),
)
SUPERVISED = SupervisedConfig(augment=AugmentConfig(crop_scale=(0.5, 1.0), flip=0.0))
PREPROCESSING = PreprocessingConfig(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
LEARNING_RATE, WEIGHT_DECAY, BETAS = 1e-3, 0.05, (0.9, 0.95)
STEPS_PER_TURN = 10
PROFILED_STEPS = 20
NUM_CLASSES = 10
SIDES = ("ours", "theirs")
TIMM_NAMES = (  # part of our name of a weight -> part of timm's
    ("layers.", "blocks."),
    ("attention.o_proj.", "attn.proj."),
    *((f"attention.{name}_proj.", "attn.qkv.") for name in "qkv"),
    ("norm_before.", "norm1."),
    ("norm_after.", "norm2."),
    ("patch_embedding.", "patch_embed.proj."),
    ("position_embedding", "pos_embed"),
    ("classifier.", "head."),
)

Inputs = tuple[Tensor, Tensor]  # normalized images [B, C, H, W]; labels [B] or order of the patches [B, N]
Step = Callable[[Inputs, float], Tensor]  # inputs, learning rate -> loss


class OurMAE(nn.Module):
    """Return the loss of our masked autoencoder for normalized images and an order of the patches.

    Args:
        objective: Objective that computes the losses.
    """

    def __init__(self, objective: MAEObjective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor, patch_order: Tensor) -> Tensor:
        return self.objective.losses(images, patch_order).mean()


class TheirMAE(nn.Module):
    """Return the loss of transformers' masked autoencoder for the same inputs.

    transformers sorts the patches by noise, so the rank of each patch in our order is passed as noise.

    Args:
        model: Model from transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, patch_order: Tensor) -> Tensor:
        loss: Tensor = self.model(images, noise=patch_order.argsort(dim=1).float()).loss
        return loss


@contextmanager
def our_step(objective: Objective, batch: int, *, compiled: bool) -> Iterator[Step]:
    """Build our training step under DeepSpeed, like the one in `pretrain/train.py`.

    Args:
        objective: Objective to train.
        batch: Number of images per step.
        compiled: Whether to compile the blocks.

    Yields:
        The training step.
    """
    if compiled:
        compile_graphs(objective)
    module = OurMAE(objective) if isinstance(objective, MAEObjective) else Classifier(objective.logits, objective)
    engine = build_engine(
        module,
        EngineConfig(
            zero_stage=1, precision="bf16" if ON_GPU else "fp32", global_batch_size=batch, micro_batch_size=batch
        ),
        OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS),
    )
    engine.train()

    def step(inputs: Inputs, rate: float) -> Tensor:
        set_learning_rate(engine.optimizer.param_groups, rate)
        loss: Tensor = engine(*inputs)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    yield step
    engine.destroy()  # otherwise its hooks keep the model in memory


def build_ours(model: ModelConfig, config: ObjectiveConfig) -> Objective:
    return build_objective(config, ViT(model), [1 / NUM_CLASSES] * NUM_CLASSES, PREPROCESSING)


def their_step(
    model: ModelConfig, config: ObjectiveConfig, weights: dict[str, Tensor] | None, *, compiled: bool
) -> Step:
    """Build a plain torch training step: bf16 autocast on a GPU, fused AdamW, clipping at 1, weight decay as in ours.

    Args:
        model: Size of the ViT.
        config: Objective, which decides between transformers and timm.
        weights: Initial weights in our names, or None for the model's own initialization.
        compiled: Whether to compile the model.
    """
    if isinstance(config, MAEConfig):
        theirs = transformers.ViTMAEForPreTraining(hub_mae_config(model, config))
        side = model.image_size // model.patch_size
        # transformers 5.23 leaves the position embeddings of a new model at zero and does not train them.
        theirs.vit.embeddings.position_embeddings.data = sincos_positions(side, model.hidden_size)
        theirs.decoder.decoder_pos_embed.data = sincos_positions(side, config.decoder_hidden_size)
        if weights:
            encoder = {f"vit.{name}": each for name, each in encoder_to_hub(select(weights, "encoder."), model).items()}
            theirs.load_state_dict(encoder | decoder_to_hub(select(weights, "decoder."), model))
        module: nn.Module = TheirMAE(torch.compile(theirs) if compiled else theirs)
    else:
        module = build_timm(model, compiled=compiled, num_classes=NUM_CLASSES)
        if weights:
            module.owner.load_state_dict(to_timm(weights, model))  # type: ignore[union-attr]
    module = module.to(DEVICE).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1 and p.shape[0] > 1]},
        {"params": [p for p in trained if p.ndim < 2 or p.shape[0] == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True)

    def step(inputs: Inputs, rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            loss: Tensor = module(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def select(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names have a prefix, without the prefix."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def to_timm(weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Return a classifier's weights with the names and shapes of timm's VisionTransformer."""
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        theirs = name.removeprefix("encoder.")
        for ours, other in TIMM_NAMES:
            theirs = theirs.replace(ours, other)
        if theirs == "patch_embed.proj.weight":
            weight = weight.reshape(-1, model.num_channels, model.patch_size, model.patch_size)  # noqa: PLW2901
        renamed[theirs] = torch.cat([renamed[theirs], weight]) if theirs in renamed else weight  # joins q, k and v
    return renamed


def load_batches(
    shards: Path, model: ModelConfig, config: ObjectiveConfig, seed: int, batch: int, steps: int
) -> list[Batch]:
    """Load all batches into host memory as uint8, so that only the training steps are timed."""
    samples = open_dataset(str(shards))
    objective = build_ours(model, config)
    batches = training_batches(
        samples,
        objective.train_view(model.image_size),
        BatchPlan(seed=seed, shuffle_window=4, global_batch_size=batch),
        start=0,
        stop=steps * batch,
    )
    return [each.tensors for each in batches]


def to_inputs(batch: Batch, config: ObjectiveConfig) -> Inputs:
    """Move a batch to the device and augment it there."""
    tensors = to_device(batch, DEVICE)
    images = augment(tensors, PREPROCESSING.image_mean, PREPROCESSING.image_std)
    return images, tensors["patch_order" if isinstance(config, MAEConfig) else "label"]


def train_both(
    steps: dict[str, Step], batches: list[Batch], config: ObjectiveConfig
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Train both sides on the same inputs, in turns; return their losses, and their seconds without the first turn."""
    losses: dict[str, list[Tensor]] = {name: [] for name in steps}
    seconds = dict.fromkeys(steps, 0.0)
    for first in range(0, len(batches), STEPS_PER_TURN):
        turn = [to_inputs(batch, config) for batch in batches[first : first + STEPS_PER_TURN]]
        for name, step in steps.items():
            wait()
            started = time.perf_counter()
            for number, inputs in enumerate(turn, start=first):
                rate = learning_rate_at(
                    number, peak=LEARNING_RATE, final=0.0, warmup_steps=len(batches) // 10, total_steps=len(batches)
                )
                losses[name].append(step(inputs, rate))
            wait()
            seconds[name] += time.perf_counter() - started if first else 0.0
    return losses, seconds


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    return MODELS[arguments.model].model_copy(update={"position_embedding": POSITIONS[arguments.objective]})


def measure(shards: Path, config: ObjectiveConfig, seed: int, arguments: argparse.Namespace) -> Row:
    """Train both sides with one seed; return their losses and the ratio of their images per second."""
    model = model_config(arguments)
    batches = load_batches(shards, model, config, seed, arguments.batch, arguments.steps)
    torch.manual_seed(seed)
    objective = build_ours(model, config)
    weights = None if arguments.own_weights else copy.deepcopy(objective.state_dict())
    with our_step(objective, arguments.batch, compiled=arguments.compile) as ours:
        steps = {"ours": ours, "theirs": their_step(model, config, weights, compiled=arguments.compile)}
        losses, seconds = train_both(steps, batches, config)
    last_losses = {side: float(torch.stack(values[-(len(values) // 10) :]).mean()) for side, values in losses.items()}
    return {**last_losses, "ratio": seconds["theirs"] / seconds["ours"]}


def free_memory() -> None:
    """Free the models of a seed and their compiled code."""
    torch.compiler.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def show_profile(shards: Path, config: ObjectiveConfig, arguments: argparse.Namespace) -> None:
    """Print the profile of one side."""
    model = model_config(arguments)
    [batch] = load_batches(shards, model, config, 0, arguments.batch, steps=1)
    inputs = to_inputs(batch, config)
    if arguments.profile == "ours":
        ours = build_ours(model, config)
        build: AbstractContextManager[Step] = our_step(ours, arguments.batch, compiled=arguments.compile)
    else:
        build = nullcontext(their_step(model, config, None, compiled=arguments.compile))
    with build as step:
        profile(lambda: step(inputs, LEARNING_RATE), PROFILED_STEPS, STEPS_PER_TURN)


def matching_rows(results: Results, **case: Any) -> list[Row]:
    return [row for row in results.rows if case.items() <= row.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=["mae", "supervised"], default="mae", help="objective to compare")
    parser.add_argument("--model", choices=MODELS, default="small", help="size of the ViT")
    parser.add_argument("--batch", type=int, default=64, help="number of images per step")
    parser.add_argument("--steps", type=int, default=400, help=f"number of steps, more than {STEPS_PER_TURN}")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds; the losses are averaged over them"
    )
    parser.add_argument("--compile", action="store_true", help="compile the models of both sides")
    parser.add_argument(
        "--own-weights",
        action="store_true",
        help="initialize each side as it does by default, instead of with the same weights",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="JSON lines file for the measurements; those that it already contains are not repeated",
    )
    parser.add_argument("--profile", choices=SIDES, help="only print the profile of this side")
    arguments = parser.parse_args()
    if arguments.steps <= STEPS_PER_TURN:
        parser.error(
            f"--steps: must be greater than {STEPS_PER_TURN}, because the first {STEPS_PER_TURN} steps are not timed"
        )
    decoder = SMALL_DECODER if arguments.model == "small" else MAEConfig(augment=SMALL_DECODER.augment)
    config: ObjectiveConfig = decoder if arguments.objective == "mae" else SUPERVISED
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    names = ("objective", "model", "batch", "steps", "compile", "own_weights")
    settings = {**{name: getattr(arguments, name) for name in names}, "where": where}
    start_distributed()
    results = Results(arguments.results)
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards/train"
        make_shards(list_digits(), shards.parent, ShardOptions(validation_fraction=0.0))
        if arguments.profile:
            show_profile(shards, config, arguments)
            return
        for seed in arguments.seeds:
            if not matching_rows(results, seed=seed, **settings):
                results.add(seed=seed, **settings, **measure(shards, config, seed, arguments))
                free_memory()
    rows = [matching_rows(results, seed=seed, **settings)[0] for seed in arguments.seeds]
    print(f"{arguments.objective}, {arguments.model}, batch {arguments.batch}, {arguments.steps} steps, {where}")
    for side in SIDES:
        values = [row[side] for row in rows]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{side}: last loss {statistics.mean(values):.4f} ± {deviation:.4f}")
    print(f"largest difference for one seed: {max(abs(row['ours'] - row['theirs']) for row in rows):.4f}")
    print(f"images per second, ours relative to theirs: {statistics.median(row['ratio'] for row in rows):.2f}")


if __name__ == "__main__":
    main()
