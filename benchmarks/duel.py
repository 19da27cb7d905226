"""The same images, steps and budget: our objectives under DeepSpeed ZeRO-1, beside the field's in a plain torch loop.

Masked autoencoding meets transformers' `ViTMAEForPreTraining`, supervised learning timm's `VisionTransformer`. Both see
the same augmented digits in the same order, with the same masks, AdamW, schedule and clipping, and begin from the same
weights (`--own-weights`: each from such as it draws itself). They take turns, some steps each, so that a busy machine
slows both. Given are the mean loss of the last tenth of the steps, over seeds, and the ratio of their images a second.

    python benchmarks/duel.py --objective mae
    python benchmarks/duel.py --objective supervised            # wants timm: pip install -r benchmarks/requirements.txt
    python benchmarks/duel.py --objective mae --model B/16 --batch 256 --steps 200 --compile           # on a GPU
    python benchmarks/duel.py --objective mae --model L/16 --batch 128 --steps 200 --compile           # the same
    python benchmarks/duel.py --objective supervised --model B/16 --batch 256 --steps 200 --compile    # the same
    python benchmarks/duel.py --objective mae --model B/16 --batch 256 --compile --profile ours        # where time goes

A long one goes on where it was stopped with `--results FILE`: what the file has is not measured again.
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
from pretrain.engine.deepspeed import build_engine, set_learning_rate, start_distributed
from pretrain.export.vit_mae import hub_mae_config
from pretrain.model.hub_names import decoder_to_hub, encoder_to_hub
from pretrain.model.vit import ViT, compile_blocks, sincos_positions
from pretrain.objectives import build_objective
from pretrain.objectives.mae import MAEObjective
from pretrain.objectives.objective import Objective
from pretrain.schedules import learning_rate_at

SMALL = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 4, "image_size": 24}
MODELS = {
    "small": ModelConfig(**SMALL),
    "B/16": ModelConfig(),
    "L/16": ModelConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}
POSITIONS = {"mae": "sincos", "supervised": "learned"}  # as the other side has them
SMALL_DECODER = MAEConfig(
    decoder_hidden_size=48,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=192,
    augment=AugmentConfig(crop_scale=(0.5, 1.0), flip=0.0),
)
SUPERVISED = SupervisedConfig(augment=AugmentConfig(crop_scale=(0.5, 1.0), flip=0.0))
PREPROCESSING = PreprocessingConfig(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
RATE, DECAY, BETAS = 1e-3, 0.05, (0.9, 0.95)
TURN = 10  # steps
PROFILED = 20  # steps
CLASSES = 10
CONTENDERS = ("ours", "theirs")
TIMM_NAMES = (
    ("layers.", "blocks."),
    ("attention.o_proj.", "attn.proj."),
    *((f"attention.{name}_proj.", "attn.qkv.") for name in "qkv"),
    ("norm_before.", "norm1."),
    ("norm_after.", "norm2."),
    ("patch_embedding.", "patch_embed.proj."),
    ("position_embedding", "pos_embed"),
    ("classifier.", "head."),
)

Inputs = tuple[Tensor, Tensor]  # normalized images, and labels or the order of the patches
Step = Callable[[Inputs, float], Tensor]


class OurMAE(nn.Module):
    """Images and masks in, loss out."""

    def __init__(self, objective: MAEObjective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor, patch_order: Tensor) -> Tensor:
        return self.objective.losses(images, patch_order).mean()


class TheirMAE(nn.Module):
    """The same of transformers'; their order of the noise is ours of the patches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, patch_order: Tensor) -> Tensor:
        loss: Tensor = self.model(images, noise=patch_order.argsort(dim=1).float()).loss
        return loss


@contextmanager
def our_step(objective: Objective, batch: int, *, compiled: bool) -> Iterator[Step]:
    """Our step under DeepSpeed, as `train.py` takes it."""
    if compiled:
        compile_blocks(objective)
    whole = OurMAE(objective) if isinstance(objective, MAEObjective) else Classifier(objective.logits, objective)
    engine = build_engine(
        whole,
        EngineConfig(
            zero_stage=1, precision="bf16" if ON_GPU else "fp32", global_batch_size=batch, micro_batch_size=batch
        ),
        OptimizerConfig(learning_rate=RATE, weight_decay=DECAY, betas=BETAS),
    )
    engine.train()

    def step(inputs: Inputs, rate: float) -> Tensor:
        set_learning_rate(engine, rate)
        loss: Tensor = engine(*inputs)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    yield step
    engine.destroy()  # else its hooks keep the model for good


def build_ours(model: ModelConfig, config: ObjectiveConfig) -> Objective:
    return build_objective(config, ViT(model), [1 / CLASSES] * CLASSES, PREPROCESSING)


def their_step(
    model: ModelConfig, config: ObjectiveConfig, weights: dict[str, Tensor] | None, *, compiled: bool
) -> Step:
    """A plain loop: bf16 autocast on a GPU, fused AdamW, clipping at 1; weights are decayed as in ours.

    It begins from our `weights`, or from its own.
    """
    if isinstance(config, MAEConfig):
        theirs = transformers.ViTMAEForPreTraining(hub_mae_config(model, config))
        side = model.image_size // model.patch_size
        # transformers 5.23 leaves those of a new model at zero, and never trains them: it would learn next to nothing.
        theirs.vit.embeddings.position_embeddings.data = sincos_positions(side, model.hidden_size)
        theirs.decoder.decoder_pos_embed.data = sincos_positions(side, config.decoder_hidden_size)
        if weights:
            encoder = {f"vit.{name}": each for name, each in encoder_to_hub(part(weights, "encoder."), model).items()}
            theirs.load_state_dict(encoder | decoder_to_hub(part(weights, "decoder."), model))
        module: nn.Module = TheirMAE(torch.compile(theirs) if compiled else theirs)
    else:
        module = build_timm(model, compiled=compiled, classes=CLASSES)
        if weights:
            module.owner.load_state_dict(to_timm(weights, model))  # type: ignore[union-attr]
    module = module.to(DEVICE).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1 and p.shape[0] > 1]},
        {"params": [p for p in trained if p.ndim < 2 or p.shape[0] == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY, betas=BETAS, fused=True)

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


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def to_timm(weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Rename a classifier's weights to those of timm's VisionTransformer."""
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        theirs = name.removeprefix("encoder.")
        for ours, other in TIMM_NAMES:
            theirs = theirs.replace(ours, other)
        if theirs == "patch_embed.proj.weight":
            weight = weight.reshape(-1, model.num_channels, model.patch_size, model.patch_size)  # noqa: PLW2901
        renamed[theirs] = torch.cat([renamed[theirs], weight]) if theirs in renamed else weight  # q, k, v are one
    return renamed


def load_batches(
    shards: Path, model: ModelConfig, config: ObjectiveConfig, seed: int, batch: int, steps: int
) -> list[Batch]:
    """Load everything beforehand, so that only the steps are compared; uint8 in the host's memory."""
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
    """Augment a batch on the device."""
    tensors = to_device(batch, DEVICE)
    images = augment(tensors, PREPROCESSING.image_mean, PREPROCESSING.image_std)
    return images, tensors["patch_order" if isinstance(config, MAEConfig) else "label"]


def fight(
    steps: dict[str, Step], batches: list[Batch], config: ObjectiveConfig
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Let both train on the same inputs, in turns; return their losses and their seconds, the first turn left out."""
    losses: dict[str, list[Tensor]] = {name: [] for name in steps}
    seconds = dict.fromkeys(steps, 0.0)
    for first in range(0, len(batches), TURN):
        turn = [to_inputs(batch, config) for batch in batches[first : first + TURN]]
        for name, step in steps.items():
            wait()
            started = time.perf_counter()
            for number, inputs in enumerate(turn, start=first):
                rate = learning_rate_at(
                    number, peak=RATE, final=0.0, warmup_steps=len(batches) // 10, total_steps=len(batches)
                )
                losses[name].append(step(inputs, rate))
            wait()
            seconds[name] += time.perf_counter() - started if first else 0.0
    return losses, seconds


def model_of(arguments: argparse.Namespace) -> ModelConfig:
    return MODELS[arguments.model].model_copy(update={"position_embedding": POSITIONS[arguments.objective]})


def measure(shards: Path, config: ObjectiveConfig, seed: int, arguments: argparse.Namespace) -> Row:
    """Let both train from one seed."""
    model = model_of(arguments)
    batches = load_batches(shards, model, config, seed, arguments.batch, arguments.steps)
    torch.manual_seed(seed)
    objective = build_ours(model, config)
    weights = None if arguments.own_weights else copy.deepcopy(objective.state_dict())
    with our_step(objective, arguments.batch, compiled=arguments.compile) as ours:
        steps = {"ours": ours, "theirs": their_step(model, config, weights, compiled=arguments.compile)}
        losses, seconds = fight(steps, batches, config)
    last = {whose: float(torch.stack(values[-(len(values) // 10) :]).mean()) for whose, values in losses.items()}
    return {**last, "ratio": seconds["theirs"] / seconds["ours"]}


def forget() -> None:
    """Free the models of a seed, and what was compiled for them."""
    torch.compiler.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def show_profile(shards: Path, config: ObjectiveConfig, arguments: argparse.Namespace) -> None:
    """Print where the time of one contender goes."""
    model = model_of(arguments)
    [batch] = load_batches(shards, model, config, 0, arguments.batch, steps=1)
    inputs = to_inputs(batch, config)
    if arguments.profile == "ours":
        ours = build_ours(model, config)
        build: AbstractContextManager[Step] = our_step(ours, arguments.batch, compiled=arguments.compile)
    else:
        build = nullcontext(their_step(model, config, None, compiled=arguments.compile))
    with build as step:
        profile(lambda: step(inputs, RATE), PROFILED, TURN)


def rows_of(results: Results, **case: Any) -> list[Row]:
    return [row for row in results.rows if case.items() <= row.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=["mae", "supervised"], default="mae")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--own-weights", action="store_true", help="each side begins from weights that it draws itself")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to keep every figure in, and to go on from")
    parser.add_argument("--profile", choices=CONTENDERS, help="show where the time of one goes, instead")
    arguments = parser.parse_args()
    if arguments.steps <= TURN:
        parser.error(f"--steps: the first {TURN} are not timed, so it must be more")
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
            if not rows_of(results, seed=seed, **settings):
                results.note(seed=seed, **settings, **measure(shards, config, seed, arguments))
                forget()
    rows = [rows_of(results, seed=seed, **settings)[0] for seed in arguments.seeds]
    print(f"{arguments.objective}, {arguments.model}, batch {arguments.batch}, {arguments.steps} steps, {where}")
    for whose in CONTENDERS:
        values = [row[whose] for row in rows]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{whose}: last loss {statistics.mean(values):.4f} ± {deviation:.4f}")
    print(f"of one seed, they differ by at most {max(abs(row['ours'] - row['theirs']) for row in rows):.4f}")
    print(f"images a second, ours to theirs: {statistics.median(row['ratio'] for row in rows):.2f}")


if __name__ == "__main__":
    main()
