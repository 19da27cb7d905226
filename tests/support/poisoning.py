"""The runs that tests/pretrain/test_health.py looks at, as data: `ranks_health.py` runs any of them by its name.

A poison maps positions of samples to factors. The loss of a batch that contains such a sample is multiplied by it.
"""

from dataclasses import dataclass, field

STEPS, BATCH_SIZE = 48, 16
NAN_GRADIENT = 0.0  # instead of a factor: the loss stays as it is, and its gradient becomes NaN
NAN, INFINITY = float("nan"), float("inf")

SINGLE_STEPS = {
    35 * BATCH_SIZE + 3: NAN,
    38 * BATCH_SIZE + 12: 1e3,
    41 * BATCH_SIZE + 9: INFINITY,
    44 * BATCH_SIZE: 300.0,
    46 * BATCH_SIZE + 7: NAN_GRADIENT,
}
FIVE_STEPS = {step * BATCH_SIZE + 5: NAN for step in range(22, 27)}
FIVE_STEPS_AFTER_A_SAVE = {step * BATCH_SIZE + 5: NAN for step in range(20, 25)}
FIVE_STEPS_AT_THE_END = {step * BATCH_SIZE + 5: NAN for step in range(STEPS - 6, STEPS - 1)}
ALL_STEPS = dict.fromkeys(range(20 * BATCH_SIZE, 200 * BATCH_SIZE), NAN)


@dataclass(frozen=True)
class PoisonedRun:
    """One training run on two ranks.

    Attributes:
        overrides: Overrides of the tiny recipe.
        poison: Factor of the loss by the position of a sample.
    """

    overrides: list[str]
    poison: dict[int, float] = field(default_factory=dict)


SAVE_OFTEN = "checkpoint.every_steps=10"
SKIPPING = {
    **{f"zero{stage}": [f"engine.zero_stage={stage}"] for stage in range(4)},
    **{f"bf16-zero{stage}": [f"engine.zero_stage={stage}", "engine.precision=bf16"] for stage in range(4)},
    "offload": ["engine.zero_stage=2", "engine.offload_optimizer=true"],
    "offload-zero3": ["engine.zero_stage=3", "engine.offload_optimizer=true"],
}
ROLLING_BACK = {
    "rollback": PoisonedRun([SAVE_OFTEN], FIVE_STEPS),
    "rollback-after-the-last-step": PoisonedRun([SAVE_OFTEN, "engine.zero_stage=1"], FIVE_STEPS_AT_THE_END),
    "rollback-to-the-poisoned-step": PoisonedRun([SAVE_OFTEN, "engine.zero_stage=3"], FIVE_STEPS_AFTER_A_SAVE),
}
RUNS = {
    "clean": PoisonedRun(["engine.zero_stage=1"]),
    **{name: PoisonedRun(["checkpoint.every_steps=36", *each], SINGLE_STEPS) for name, each in SKIPPING.items()},
    **ROLLING_BACK,
    "diverging": PoisonedRun([SAVE_OFTEN, "health.max_rollbacks=2", "health.max_consecutive_skips=3"], ALL_STEPS),
}
