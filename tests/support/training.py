"""The training runs that tests/pretrain/train looks at, as data: `ranks_train.py` runs any of them by its name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.launching import ROOT

Trained = Callable[[int, str], dict[str, Any]]  # world size, name -> what the main rank has seen

EMA_DECAY = 0.3  # larger than the decay that the first steps use, smaller than that of the last ones
STEPS = 8
MIDDLE, LAST = "step-00000004", "step-00000008"
WORLD_SIZES = (1, 2)

PROBED = ["evaluation.every_steps=5", "evaluation.probe_every_steps=4", "evaluation.probe_samples=50"]
DROPOUT = ["model.dropout=0.2", "model.attention_dropout=0.1", "model.drop_path=0.2"]
MAE = (
    "objective={name: mae, mask_ratio: 0.5, decoder_hidden_size: 16, decoder_num_hidden_layers: 1, "
    "decoder_num_attention_heads: 2, decoder_intermediate_size: 32}"
)
DISTILLATION = [
    "objective={name: self_distillation, num_local_crops: 2, local_image_size: 16, num_prototypes: 32, "
    "head_hidden_size: 32, head_bottleneck_size: 16, augment: {crop_scale: [0.5, 1.0], blur: 0.5, solarize: 0.2}}",
    "ema.decay=0",
    "engine.micro_batch_size=16",  # Sinkhorn balances the micro-batches of all ranks together
    "evaluation.probe_every_steps=8",
    "evaluation.probe_samples=50",
]
LAYER_DECAY = ["optimizer.layer_decay=0.7"]
LAMB = ["optimizer.name=lamb", "optimizer.learning_rate=1e-2", *LAYER_DECAY, "schedule.name=linear"]
MUON = ["optimizer.name=muon", "optimizer.learning_rate=1e-2", *LAYER_DECAY]
MUON += ["schedule.name=wsd", "schedule.cooldown_steps=3"]
EVERYTHING = [
    "model.layer_scale=0.1",
    "objective.loss=binary_cross_entropy",
    "objective.patch_dropout=0.25",
    "objective.augment.three_augment=true",
    "engine.zero_stage=1",
    "optimizer.scaling=linear",
    "optimizer.learning_rate=0.016",
    "schedule.name=wsd",
    "schedule.cooldown_steps=3",
    "schedule.image_sizes=[[0.25, 16], [0.75, 24]]",
    "data.repeats=2",
]
BF16, COMPILE, OFFLOAD = "engine.precision=bf16", "engine.compile=true", "engine.offload_optimizer=true"
BATCH_OF_10 = "engine.global_batch_size=10"


@dataclass(frozen=True)
class Setting:
    """One training run of eight steps.

    Attributes:
        overrides: Overrides of the tiny recipe.
        is_resumed: Whether the run is repeated from its checkpoint at step 4.
        continued_with: Overrides with which the other world size continues that checkpoint; None if it does not.
        world_sizes: Numbers of ranks that train it.
        num_workers: Number of data workers.
    """

    overrides: list[str]
    is_resumed: bool = True
    continued_with: list[str] | None = None
    world_sizes: tuple[int, ...] = WORLD_SIZES
    num_workers: int = 0

    @property
    def is_bf16(self) -> bool:
        """Whether bf16 has a part in the run or in its continuation."""
        return BF16 in [*self.overrides, *(self.continued_with or [])]


def zero(stage: int) -> str:
    return f"engine.zero_stage={stage}"


SUPERVISED = {
    "zero0": Setting([zero(0), *PROBED], continued_with=[zero(3), *PROBED]),
    "zero1": Setting([zero(1), *PROBED], continued_with=[zero(0), *PROBED]),
    "zero2": Setting([zero(2), *PROBED], continued_with=[zero(1), *PROBED]),
    "zero3": Setting([zero(3), *PROBED], continued_with=[zero(2), *PROBED]),
    "offload": Setting([OFFLOAD, "evaluation.every_steps=5"], continued_with=[zero(3), *PROBED]),
    "dropout": Setting(DROPOUT, continued_with=[*DROPOUT, OFFLOAD, "evaluation.every_steps=5"]),
    "dropout-zero3": Setting([*DROPOUT, zero(3), "engine.activation_checkpointing=true"]),
    "no-clipping": Setting(
        ["engine.gradient_clipping=0", zero(0)], continued_with=["engine.gradient_clipping=0", BF16, zero(1)]
    ),
    "everything": Setting(EVERYTHING),
}
BATCHES_OF_10 = {
    "batch-of-10": Setting([BATCH_OF_10, "engine.micro_batch_size=10", zero(1)], num_workers=1),
    "uneven-ranks": Setting([BATCH_OF_10, "engine.micro_batch_size=2", zero(1)]),
    "uneven-ranks-zero3": Setting(
        [BATCH_OF_10, "engine.micro_batch_size=2", zero(3)],
        continued_with=[BATCH_OF_10, "engine.micro_batch_size=2", zero(1)],
    ),
}
OBJECTIVES = {
    "mae-zero0": Setting([MAE, *PROBED, zero(0)]),
    "mae-zero1": Setting([MAE, *PROBED, zero(1)], is_resumed=False),
    "mae-zero2": Setting([MAE, *PROBED, zero(2)], is_resumed=False),
    "mae-zero3": Setting([MAE, *PROBED, zero(3)]),
    "mae-bf16": Setting([MAE, BF16], is_resumed=False),
    "distillation-zero0": Setting([*DISTILLATION, zero(0)], is_resumed=False),
    "distillation-zero1": Setting([*DISTILLATION, zero(1)], is_resumed=False),
    "distillation-zero2": Setting([*DISTILLATION, zero(2)], continued_with=[*DISTILLATION, zero(1)]),
    "distillation-bf16": Setting([*DISTILLATION, BF16]),
    # The second rank trains on a copy of the only sample.
    "distillation-batch-of-1": Setting([*DISTILLATION, "engine.global_batch_size=1"], is_resumed=False),
}
OPTIMIZERS = {
    **{f"layer-decay-zero{stage}": Setting([*LAYER_DECAY, zero(stage)], is_resumed=False) for stage in range(4)},
    **{f"lamb-zero{stage}": Setting([*LAMB, zero(stage)], is_resumed=False) for stage in range(3)},
    "lamb-zero3": Setting([*LAMB, zero(3)], continued_with=[*LAMB, zero(1)]),
    **{f"muon-zero{stage}": Setting([*MUON, zero(stage)], is_resumed=False) for stage in range(3)},
    "muon-zero3": Setting([*MUON, zero(3)], continued_with=[*MUON, zero(0)]),
    "lamb-offload": Setting([*LAMB, OFFLOAD, zero(1)], is_resumed=False),
    "muon-offload": Setting([*MUON, OFFLOAD, zero(2)], is_resumed=False),
}
PRECISION = {
    "bf16-zero0": Setting([BF16, zero(0)], continued_with=[BF16, zero(3)]),
    "bf16-zero1": Setting([BF16, zero(1)], continued_with=[BF16, zero(0)]),
    "bf16-zero3": Setting([BF16, zero(3)], continued_with=[zero(1), *PROBED]),
    "bf16-dropout": Setting([*DROPOUT, "model.position_embedding=sincos", BF16]),
    "layer-decay-bf16": Setting([*LAYER_DECAY, BF16, zero(3)]),
    "lamb-bf16": Setting([*LAMB, BF16, zero(2)], is_resumed=False),
    "muon-bf16": Setting([*MUON, BF16, zero(1)]),
    "muon-bf16-zero0": Setting([*MUON, BF16, zero(0)]),
}
RAND_AUGMENT = ["objective.augment.rand_augment_ops=2", "objective.augment.erasing=0.25", "model.drop_path=0.3"]
DEEP = ["model.num_hidden_layers=12", "engine.micro_batch_size=16", BF16, zero(1)]  # 200 trained tensors
KERNELS = {
    "deep": Setting(DEEP, is_resumed=False, world_sizes=(1,)),
    "deep-lamb": Setting([*DEEP, "optimizer.name=lamb"], is_resumed=False, world_sizes=(1,)),
    "rand-augment": Setting([*RAND_AUGMENT, *LAYER_DECAY, BF16, zero(1)], is_resumed=False),
}
COMPILED = {  # compiling takes long
    "compiled": Setting([COMPILE, zero(1)], world_sizes=(1,)),
    "compiled-zero3": Setting([COMPILE, zero(3)], world_sizes=(2,)),
}
SETTINGS = SUPERVISED | BATCHES_OF_10 | OBJECTIVES | OPTIMIZERS | PRECISION | KERNELS | COMPILED
IN_MLFLOW = 2, "mae-zero3"  # the run that MLflow is told of; the others train without it

REFERENCES = {  # plain torch loop, on one process -> its overrides
    "reference": [],
    "reference-layer-decay": LAYER_DECAY,
    "reference-lamb": LAMB,
    "reference-muon": MUON,
}
STARTS = {"start": [], "start-distillation": DISTILLATION}  # weights before the first step
RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))}

STOPPED, FULL_DISK, KILLED_IN_SAVE = "stopped-in-evaluation", "full-disk", "killed-in-save"
LONG, LONG_RUN = "long", ["schedule.total_steps=150", "checkpoint.every_steps=20"]
REFUSED = "refused"  # starts that end with a sentence
STREAM = "stream"  # tars without an index, then again from where it stopped
CONTINUED, OWED, RECIPE = "continued/", "owed-evaluation/", "recipe/"
NEW_TARS, NEW_TARS_SETTING = "new-tars", "zero2"  # the setting is trained from tars without an index
OWED_EVALUATIONS = ("zero1", "distillation-zero2")


def all_runs() -> list[tuple[int, str]]:
    """Return the world size and the name of every run."""
    runs = [(size, name) for name, setting in SETTINGS.items() for size in setting.world_sizes]
    runs += [(1, name) for name in [*REFERENCES, *STARTS, *(RECIPE + name for name in RECIPES)]]
    runs += [(2, NEW_TARS), (2, LONG), (1, REFUSED)]
    for size in WORLD_SIZES:
        runs += [(size, name) for name in (STOPPED, FULL_DISK, KILLED_IN_SAVE, STREAM)]
        runs += [(size, OWED + name) for name in OWED_EVALUATIONS]
        runs += [(size, CONTINUED + name) for name, setting in SETTINGS.items() if setting.continued_with is not None]
    return runs


def needs(world_size: int, name: str) -> list[tuple[int, str]]:
    """Return the runs whose checkpoints a run starts from."""
    if name.startswith(CONTINUED):
        return [(3 - world_size, name.removeprefix(CONTINUED))]
    return [(world_size, name.removeprefix(OWED))] if name.startswith(OWED) else []


def column(seen: dict[str, Any], metric: str) -> list[float]:
    """Return the values of a metric in a run's rows."""
    return [row[metric] for row in seen["rows"] if metric in row]


def digest_distance(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Return the distance between two sets of weights, by their digests."""
    return float(np.linalg.norm([np.subtract(one[name], other[name]) for name in one]))


def resumed(settings: dict[str, Setting]) -> list[tuple[int, str]]:
    """Return the world size and the name of every run that is repeated from its checkpoint in the middle."""
    return [(size, name) for name, setting in settings.items() if setting.is_resumed for size in setting.world_sizes]


def assert_resumed_exactly(seen: dict[str, Any], num_distinct_samples: float) -> None:
    """Assert that the resumed run repeats the samples, every row and every weight, bit for bit."""
    assert seen["resumed_at"] == 4
    assert seen["same_samples"]
    assert seen["num_distinct_samples"] == num_distinct_samples
    assert seen["resumed"] == seen["rows"]
    assert [row["step"] for row in seen["rows"] if "train/loss" in row] == list(range(1, STEPS + 1))
    assert seen["same_weights"]
    assert seen["finite"]
