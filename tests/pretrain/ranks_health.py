"""Train on two ranks while some samples poison the loss of their step; test_health.py compares what the main rank sees.

The runs are listed in tests/support/poisoning.py. Any of them can be run alone:

    pytest tests/pretrain/test_health.py -k bf16-zero3
    python tests/pretrain/ranks_health.py --only bf16-zero3 --folder /tmp/runs
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch._dynamo
import torch._inductor.compile_fx  # torch and DeepSpeed import both late; here every forked rank finds them imported
from torch import Tensor

from pretrain import distributed
from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.manifest import Manifest
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
from tests.support.poisoning import BATCH_SIZE, NAN_GRADIENT, RUNS, STEPS
from tests.support.ranks import main


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run one of the runs on this rank; return what the main rank has seen."""
    start_distributed()
    fixed = ["tracking.uri=off", "data.num_workers=0", f"schedule.total_steps={STEPS}", f"run_dir={folder / 'run'}"]
    config = load_config(PretrainConfig, folder.parents[1] / "tiny.yaml", [*fixed, *RUNS[name].overrides]).config
    seen = train_poisoned(config, RUNS[name].poison)
    distributed.leave_process_group()
    return seen


def train_poisoned(config: PretrainConfig, poison: dict[int, float]) -> dict[str, Any]:
    """Train to the end, multiplying the loss of a batch by the poison of its samples."""
    factor, last_position = 1.0, 0

    def find_poison(batch: Batch, device: torch.device) -> Batch:
        nonlocal factor, last_position
        positions = batch["position"].tolist() if run.objective.training else []
        last_position = max([last_position, *positions])
        factor = next((poison[position] for position in positions if position in poison), 1.0)
        return to_device(batch, device)

    forward = SupervisedObjective.forward

    def poisoned_forward(objective: SupervisedObjective, batch: Batch, output: Output = "losses") -> dict[str, Tensor]:
        losses = forward(objective, batch, output)
        loss = losses["loss"]
        if factor == NAN_GRADIENT:
            return {**losses, "loss": loss + (loss - loss.detach()).abs().sqrt()}
        return {**losses, "loss": loss * factor}

    outcomes, message = [], ""
    with (
        open_run(config) as run,
        mock.patch("pretrain.steps.to_device", find_poison),
        mock.patch.object(SupervisedObjective, "forward", poisoned_forward),
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
    places = [order.locate(position)[1:] for position in poison if position < STEPS * BATCH_SIZE]
    samples = [run.data.training.fetch(*place) for place in places]
    rows = read_rows(config.run_dir / "metrics.jsonl")
    skipped = config.run_dir / "skipped.jsonl"
    checkpoints = list_checkpoints(config.run_dir)
    saved = Manifest.load(checkpoints[-1]).state
    return {
        "outcomes": [outcome.name for outcome in outcomes],
        "message": message,
        "validation_losses": [row["validation/loss"] for row in rows if "validation/loss" in row],
        "skipped": [json.loads(line) for line in skipped.read_text().splitlines()] if skipped.exists() else [],
        "finite": all(bool(w.isfinite().all()) for path in checkpoints for w in load_weights(path).values()),
        "steps": [row["step"] for row in rows if "optim/learning_rate" in row],
        "position": run.state.position,
        "images_seen": run.state.images_seen,
        "saved": [saved.step, saved.position, saved.images_seen],
        "last_position": last_position,
        "poisoned": [[sample.shard, sample.key] for sample in samples],
    }


if __name__ == "__main__":
    main(run, __doc__, [(2, name) for name in RUNS])
