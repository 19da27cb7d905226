"""Run by every rank of `test_health.py`: runs in which some samples poison their step; the main rank writes JSON."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.pieces import load_weights
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.data.transforms.batch import Batch, to_device
from pretrain.engine.deepspeed import start_distributed
from pretrain.errors import DivergedError
from pretrain.journal import read_rows
from pretrain.objectives.objective import Output
from pretrain.objectives.supervised import SupervisedObjective
from pretrain.outcome import Outcome
from pretrain.run import open_run
from pretrain.stop_signal import StopSignal
from pretrain.train import train_with_tracking

STEPS, BATCH = 60, 16
GRADIENT = 0.0  # the loss stays as it is, its gradient becomes NaN
FAULTS = {
    35 * BATCH + 3: float("nan"),
    41 * BATCH + 12: 1e3,
    47 * BATCH + 9: float("inf"),
    52 * BATCH: 300.0,
    55 * BATCH + 7: GRADIENT,
}
IN_A_ROW = {step * BATCH + 5: float("nan") for step in range(22, 27)}
AFTER_A_SAVE = {step * BATCH + 5: float("nan") for step in range(20, 25)}
SETTINGS = {
    "stage0": ["engine.zero_stage=0"],
    "stage1": ["engine.zero_stage=1"],
    "stage2": ["engine.zero_stage=2"],
    "stage3": ["engine.zero_stage=3"],
    "bf16-stage0": ["engine.zero_stage=0", "engine.precision=bf16"],
    "bf16-stage1": ["engine.zero_stage=1", "engine.precision=bf16"],
    "bf16-stage2": ["engine.zero_stage=2", "engine.precision=bf16"],
    "bf16-stage3": ["engine.zero_stage=3", "engine.precision=bf16"],
    "offload": ["engine.zero_stage=2", "engine.offload_optimizer=true"],
}


def run_poisoned(config: PretrainConfig, poison: dict[int, float]) -> dict[str, Any]:
    """Train to the end, the loss of whatever batch holds a poisoned sample multiplied by its poison."""
    factor, last = 1.0, 0

    def look(batch: Batch, device: torch.device) -> Batch:
        nonlocal factor, last
        positions = batch["position"].tolist() if run.objective.training else []
        last = max([last, *positions])
        factor = next((poison[position] for position in positions if position in poison), 1.0)
        return to_device(batch, device)

    forward = SupervisedObjective.forward

    def poisoned(objective: SupervisedObjective, batch: Batch, output: Output = "losses") -> dict[str, Tensor]:
        losses = forward(objective, batch, output)
        loss = losses["loss"]
        if factor == GRADIENT:
            return {**losses, "loss": loss + (loss - loss.detach()).abs().sqrt()}
        return {**losses, "loss": loss * factor}

    outcomes, message = [], ""
    with (
        open_run(config) as run,
        mock.patch("pretrain.steps.to_device", look),
        mock.patch.object(SupervisedObjective, "forward", poisoned),
    ):
        while not outcomes or outcomes[-1] is Outcome.DIVERGED:
            try:
                if outcomes:
                    run.roll_back()
                outcomes.append(train_with_tracking(run, "", StopSignal()))
            except DivergedError as error:
                message = str(error)
                break
    order = run.data.training.order(config.seed, config.data.shuffle_window)
    fetched = (run.data.training.fetch(*order.locate(position)[1:]) for position in poison if position < STEPS * BATCH)
    rows = read_rows(config.run_dir / "metrics.jsonl")
    ledger = config.run_dir / "skipped.jsonl"
    checkpoints = list_checkpoints(config.run_dir)
    return {
        "outcomes": [outcome.name for outcome in outcomes],
        "message": message,
        "loss": [row["validation/loss"] for row in rows if "validation/loss" in row],
        "skipped": [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else [],
        "finite": all(bool(w.isfinite().all()) for path in checkpoints for w in load_weights(path).values()),
        "steps": [row["step"] for row in rows if "optim/learning_rate" in row],
        "samples": run.state.position,
        "images_seen": run.state.images_seen,
        "last_position": last,
        "poisoned": [[encoded.shard, encoded.key] for encoded in fetched],
        "checkpoints": len(checkpoints),
    }


def main(recipe: Path, folder: Path) -> None:
    start_distributed()
    seen: dict[str, Any] = {}

    def look(name: str, poison: dict[int, float], *overrides: str) -> None:
        settings = ["tracking.uri=off", "data.num_workers=0", f"schedule.total_steps={STEPS}", *overrides]
        config = load_config(PretrainConfig, recipe, [*settings, f"run_dir={folder / name}"]).config
        seen[name] = run_poisoned(config, poison)

    look("clean", {}, *SETTINGS["stage1"])
    for name, overrides in SETTINGS.items():
        look(name, FAULTS, "checkpoint.every_steps=36", *overrides)
    look("rolled back", IN_A_ROW, "checkpoint.every_steps=10")
    look("rolled back to their beginning", AFTER_A_SAVE, "checkpoint.every_steps=10", *SETTINGS["stage3"])
    always = {position: float("nan") for position in range(20 * BATCH, 200 * BATCH)}
    look("hopeless", always, "checkpoint.every_steps=10", "health.max_rollbacks=2", "health.max_consecutive_skips=3")
    if distributed.is_main():
        (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
