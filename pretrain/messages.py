"""What a run prints at its start and at its end."""

import shlex

from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.objectives.objective import Objective
from pretrain.run import Run
from pretrain.tracking.progress import summary
from pretrain.tracking.tracker import records_of

MANY_EPOCHS = 2000  # more than any published recipe; MAE's longest schedule has 1600


def describe_run(run: Run) -> str:
    """Describe a run in one line: model size, data, ranks, ZeRO stage, precision, batch, length and learning rate."""
    config, num_ranks = run.config, distributed.world_size()
    batch_size, total_steps = config.engine.global_batch_size, config.schedule.total_steps
    epochs = f" ({run.num_epochs:.3g} epochs)" if run.num_epochs else ""
    return (
        f"{count_parameters(run.objective) / 1e6:.1f} M parameters, {run.data.training.describe()}, "
        f"{num_ranks} {'rank' if num_ranks == 1 else 'ranks'} on {run.engine.device.type}, "
        f"ZeRO {config.engine.zero_stage}, {config.engine.precision}, batch {batch_size}, "
        f"from step {run.state.step} to {total_steps}{epochs}, {config.optimizer.describe_learning_rate(batch_size)}"
    )


def count_parameters(objective: Objective) -> int:
    """Return the number of parameters, also of those that ZeRO 3 has partitioned."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in objective.parameters())


def describe_long_schedule(run: Run) -> str | None:
    """Return a warning if the schedule passes over the data thousands of times, as a recipe for a large set may."""
    if run.num_epochs < MANY_EPOCHS:
        return None
    return (
        f"warning: the schedule passes {run.num_epochs:,.0f} times over the {run.data.samples_per_epoch} training "
        "images; for fewer passes, lower schedule.epochs, or set it in place of schedule.total_steps"
    )


def describe_end(config: PretrainConfig) -> str:
    """Return what a finished run has left, where to look at it, and the command that uses it."""
    run_dir = config.run_dir
    export = shlex.join(["vitrail", "export", str(run_dir), str(run_dir / "export")])
    facts = {**records_of(run_dir, config.tracking), "next": export}
    return summary(f"done: {config.schedule.total_steps} steps", facts)
