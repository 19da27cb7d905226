"""Run by every rank of `test_train.py`: many small runs in one launch; the main rank writes what it saw as JSON."""

import errno
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.optim.swa_utils import AveragedModel

from pretrain import distributed
from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.manifest import SavedFile
from pretrain.checkpoint.pieces import Reader, load_weights, write_file
from pretrain.checkpoint.restore import newest_intact
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.loader import BatchPlan, training_batches
from pretrain.data.loading.meters import STAGES as STAGES_OF_INPUT
from pretrain.data.transforms.batch import Batch, to_device
from pretrain.engine.deepspeed import start_distributed
from pretrain.engine.partitions import count_optimizer_steps
from pretrain.journal import read_rows
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.optimizers import build_optimizer
from pretrain.run import open_run
from pretrain.schedules import learning_rate_at
from pretrain.stop_signal import StopSignal
from pretrain.train import train_with_tracking

PROBED = ["evaluation.every_steps=5", "evaluation.probe_every_steps=4", "evaluation.probe_samples=50"]
STAGES = {f"stage{stage}": [f"engine.zero_stage={stage}", *PROBED] for stage in range(4)}
NOISY = ["model.dropout=0.2", "model.attention_dropout=0.1", "model.drop_path=0.2"]
MAE = (
    "objective={name: mae, mask_ratio: 0.5, decoder_hidden_size: 16, decoder_num_hidden_layers: 1, "
    "decoder_num_attention_heads: 2, decoder_intermediate_size: 32}"
)
DISTIL = [
    "objective={name: self_distillation, num_local_crops: 2, local_image_size: 16, num_prototypes: 32, "
    "head_hidden_size: 32, head_bottleneck_size: 16, augment: {crop_scale: [0.5, 1.0], blur: 0.5, solarize: 0.2}}",
    "ema.decay=0",
    "engine.micro_batch_size=16",  # what is balanced together is a micro-step of all ranks
    "evaluation.probe_every_steps=8",
    "evaluation.probe_samples=50",
]
DECAYED = "optimizer.layer_decay=0.7"
LAMB = ["optimizer.name=lamb", "optimizer.learning_rate=1e-2", DECAYED, "schedule.name=linear"]
MUON = ["optimizer.name=muon", "optimizer.learning_rate=1e-2", DECAYED]
MUON += ["schedule.name=wsd", "schedule.cooldown_steps=3"]
OTHERS = {
    **{f"distil{stage}": [*DISTIL, f"engine.zero_stage={stage}"] for stage in range(3)},
    "distil-bf16": [*DISTIL, "engine.precision=bf16"],
    "distil-one": [*DISTIL, "engine.global_batch_size=1"],  # the second rank has a copy
    "mae-bf16": [MAE, "engine.precision=bf16"],
    **{f"mae{stage}": [MAE, *PROBED, f"engine.zero_stage={stage}"] for stage in range(4)},
    "recipe": [
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
    ],
    **{f"decayed{stage}": [DECAYED, f"engine.zero_stage={stage}"] for stage in range(4)},
    **{f"lamb{stage}": [*LAMB, f"engine.zero_stage={stage}"] for stage in range(4)},
    **{f"muon{stage}": [*MUON, f"engine.zero_stage={stage}"] for stage in range(4)},
    "dropout": NOISY,
    "dropout3": [*NOISY, "engine.zero_stage=3", "engine.activation_checkpointing=true"],
    "bf16-stage0": ["engine.precision=bf16", "engine.zero_stage=0"],
    "bf16-stage1": ["engine.precision=bf16", "engine.zero_stage=1"],
    "bf16-stage3": ["engine.precision=bf16", "engine.zero_stage=3"],
    "bf16-noisy": [*NOISY, "model.position_embedding=sincos", "engine.precision=bf16"],
    "offload": ["engine.offload_optimizer=true", "evaluation.every_steps=5"],
    "decayed-bf16": [DECAYED, "engine.precision=bf16", "engine.zero_stage=3"],
    "lamb-bf16": [*LAMB, "engine.precision=bf16", "engine.zero_stage=2"],
    "muon-bf16": [*MUON, "engine.precision=bf16", "engine.zero_stage=1"],
    "muon-bf16-stage0": [*MUON, "engine.precision=bf16", "engine.zero_stage=0"],
    "lamb-offload": [*LAMB, "engine.offload_optimizer=true", "engine.zero_stage=1"],
    "muon-offload": [*MUON, "engine.offload_optimizer=true", "engine.zero_stage=2"],
    "compiled": ["engine.compile=true", "engine.zero_stage=1"],
    "compiled3": ["engine.compile=true", "engine.zero_stage=3"],
    "ten": ["engine.global_batch_size=10", "engine.micro_batch_size=10", "engine.zero_stage=1"],
    "uneven": ["engine.global_batch_size=10", "engine.micro_batch_size=2", "engine.zero_stage=1"],
    "uneven3": ["engine.global_batch_size=10", "engine.micro_batch_size=2", "engine.zero_stage=3"],
    "unclipped": ["engine.gradient_clipping=0", "engine.zero_stage=0"],
}
RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs" / "pretrain").glob("*.yaml"))
COMPILED_ELSEWHERE = {1: "compiled3", 2: "compiled"}  # compiling takes long
NOT_RESUMED = {
    "mae1",
    "mae2",
    "distil0",
    "distil1",
    "decayed0",
    "decayed1",
    "decayed2",
    "decayed3",
    "lamb0",
    "lamb1",
    "lamb2",
    "muon0",
    "muon1",
    "muon2",
    "distil-one",
    "mae-bf16",
    "lamb-bf16",
    "lamb-offload",
    "muon-offload",
}  # the others show that
RESHARDED = {  # what was saved -> how it is continued
    "stage0": ("stage3", STAGES["stage3"]),
    "stage1": ("stage0", STAGES["stage0"]),
    "stage2": ("stage1", STAGES["stage1"]),
    "stage3": ("stage2", STAGES["stage2"]),
    "offload": ("stage3", STAGES["stage3"]),
    "bf16-stage0": ("bf16-stage3", OTHERS["bf16-stage3"]),
    "bf16-stage1": ("bf16-stage0", OTHERS["bf16-stage0"]),
    "bf16-stage3": ("stage1", STAGES["stage1"]),
    "uneven3": ("uneven", OTHERS["uneven"]),
    "dropout": ("offload", [*NOISY, *OTHERS["offload"]]),
    "unclipped": ("bf16-stage1", ["engine.gradient_clipping=0", *OTHERS["bf16-stage1"]]),
    "lamb3": ("lamb1", OTHERS["lamb1"]),
    "muon3": ("muon0", OTHERS["muon0"]),
    "distil2": ("distil1", OTHERS["distil1"]),
}
IN_MLFLOW = "mae3"
SPEEDS = {
    "time",
    "probe/seconds",
    "speed/images_per_second",
    "data/wait_fraction",
    "data/batches_ready",
    "data/megabytes_per_second",
    *(f"data/{stage}_busy" for stage in STAGES_OF_INPUT),
}
WEIGHT = "encoder.patch_embedding.weight"
EMA_DECAY = 0.3  # more than the first steps' own, less than the last ones'
MIDDLE, LAST = "step-00000004", "step-00000008"


def run_to_end(config: PretrainConfig) -> tuple[int, list[int], list[int]]:
    """Train to the last step; return the step it began at, each position and each micro-batch's pixels on this rank."""
    positions, pixels = [], []

    def note(batch: Batch, device: torch.device) -> Batch:
        if run.objective.training:
            positions.extend(batch["position"].tolist())
            pixels.extend([batch["image"].shape[-1]] if "image" in batch else [])
        return to_device(batch, device)

    with open_run(config) as run, mock.patch("pretrain.steps.to_device", note):
        first = run.state.step
        assert count_optimizer_steps(run.engine) == first  # DeepSpeed itself has taken none
        run.watch.finish(train_with_tracking(run, "", StopSignal()))
    return first, positions, pixels


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """What must be the same whenever a run is repeated: everything but speed."""
    return [
        {name: value for name, value in row.items() if name not in SPEEDS}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]


def check(recipe: Path, folder: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """Train to the end; then, but for some, again from the checkpoint in the middle."""
    whole_dir, resumed_dir = folder / name / "whole", folder / name / "resumed"
    settings = ["tracking.uri=off", f"ema.decay={EMA_DECAY}", *overrides]
    settings += [] if name == "ten" else ["data.num_workers=0"]
    settings += [f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"] if name == IN_MLFLOW else []
    _, positions, pixels = run_to_end(load_config(PretrainConfig, recipe, [*settings, f"run_dir={whole_dir}"]).config)
    weights, averages = ({}, {}) if not distributed.is_main() else both_kinds(whole_dir)
    seen = {
        "rows": rows_of(whole_dir),
        "distinct_samples": len(set(positions)),
        "image_sizes": pixels,
        "weights": {name: digest(weight) for name, weight in weights.items()},
        "averages": {name: digest(average) for name, average in averages.items()},
    }
    if name in NOT_RESUMED:
        return seen
    if distributed.is_main():
        shutil.copytree(whole_dir / "checkpoints" / MIDDLE, resumed_dir / "checkpoints" / MIDDLE)
        shutil.copy(whole_dir / "metrics.jsonl", resumed_dir / "metrics.jsonl")
    distributed.barrier()
    first, repeated, _ = run_to_end(load_config(PretrainConfig, recipe, [*settings, f"run_dir={resumed_dir}"]).config)
    if not distributed.is_main():
        return {}
    pairs = zip((weights, averages), both_kinds(resumed_dir), strict=True)
    return seen | {
        "resumed": rows_of(resumed_dir),
        "resumed_at": first,
        "same_samples": bool(repeated) and repeated == positions[len(positions) // 2 :],
        "same_weights": all(torch.equal(one[key], two[key]) for one, two in pairs for key in one | two),
        "rounded": torch.equal(weights[WEIGHT], weights[WEIGHT].bfloat16().float()),
        "finite": all(bool(weight.isfinite().all()) for weight in weights.values()),
    }


def both_kinds(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the last checkpoint's weights and averages."""
    last = run_dir / "checkpoints" / LAST
    return load_weights(last), load_weights(last, averaged=True)


def reshard(recipe: Path, folder: Path, source: Path) -> dict[str, dict[str, Any]]:
    """Continue what another world size saved at one stage, at another stage and precision; return what came of it."""
    seen = {}
    for saved, (name, overrides) in RESHARDED.items():
        run_dir = folder / f"{saved}-to-{name}"
        if distributed.is_main():
            shutil.copytree(source / saved / "whole" / "checkpoints" / MIDDLE, run_dir / "checkpoints" / MIDDLE)
        distributed.barrier()
        settings = [
            "tracking.uri=off",
            "data.num_workers=0",
            f"ema.decay={EMA_DECAY}",
            *overrides,
            f"run_dir={run_dir}",
        ]
        held: dict[str, int] = {}
        with mock.patch("pretrain.checkpoint.restore.Reader", counting(held)):
            first, *_ = run_to_end(load_config(PretrainConfig, recipe, settings).config)
        if distributed.is_main():
            assert first == 4
            weights, averages = both_kinds(run_dir)
            seen[saved] = {
                "rows": rows_of(run_dir),
                "averages": {name: digest(average) for name, average in averages.items()},
                "shares": {kind: n / sum(weight.numel() for weight in weights.values()) for kind, n in held.items()},
            }
    return seen


def counting(held: dict[str, int]) -> type[Reader]:
    """Return a reader that counts what this rank reads, by kind."""

    class CountingReader(Reader):
        def read_into(self, out: torch.Tensor, name: str, start: int, kind: str = "weight") -> None:
            held[kind] = held.get(kind, 0) + out.numel()
            super().read_into(out, name, start, kind)

    return CountingReader


def digest(weight: torch.Tensor) -> list[float]:
    """Three numbers that a tensor of other values, or in another order, does not have."""
    flat = weight.double().flatten()
    return [float(flat.sum()), float(flat.norm()), float(flat @ torch.linspace(-1, 1, len(flat), dtype=torch.float64))]


def stop_in_an_evaluation(recipe: Path, folder: Path) -> dict[str, Any]:
    """Let the last rank be asked to stop in the second batch of the evaluation after step 3."""
    settings = [f"run_dir={folder / 'stopped'}", "tracking.uri=off", "evaluation.every_steps=3", "data.num_workers=0"]
    stop, evaluated = StopSignal(), 0

    def ask(batch: Batch, device: torch.device) -> Batch:
        nonlocal evaluated
        evaluated += 1
        stop.is_requested = evaluated == 2 and distributed.rank() == distributed.world_size() - 1
        return to_device(batch, device)

    config = load_config(PretrainConfig, recipe, settings).config
    with open_run(config) as run, mock.patch("pretrain.evaluation.to_device", ask):
        outcome = train_with_tracking(run, "", stop)
    return {"outcome": outcome.name, "evaluated": evaluated, "rows": rows_of(folder / "stopped")}


def end_before_the_last_evaluation(recipe: Path, folder: Path, name: str) -> list[dict[str, Any]]:
    """Continue a run that was killed after its last save; return the rows that come."""
    run_dir = folder / "killed" / name
    if distributed.is_main():
        shutil.copytree(folder / name / "whole" / "checkpoints" / LAST, run_dir / "checkpoints" / LAST)
    distributed.barrier()
    settings = ["tracking.uri=off", f"ema.decay={EMA_DECAY}", *(STAGES | OTHERS)[name], f"run_dir={run_dir}"]
    run_to_end(load_config(PretrainConfig, recipe, settings).config)
    return rows_of(run_dir)


def fail_in_a_save(recipe: Path, folder: Path) -> dict[str, Any]:
    """Let the last rank's disk refuse the save at step 4 until it gives up; return what is left at the end."""
    settings = [f"run_dir={folder / 'full'}", "tracking.uri=off", "data.num_workers=0"]

    def write_or_refuse(path: Path, *arguments: Any) -> SavedFile:
        if MIDDLE in str(path) and distributed.rank() == distributed.world_size() - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_file(path, *arguments)

    seen_after: dict[int, list[str]] = {}

    def note(batch: Batch, device: torch.device) -> Batch:
        names = sorted(path.name for path in (folder / "full" / "checkpoints").glob("*"))
        seen_after[run.state.step] = names
        time.sleep(0.3 if run.state.step in (4, 5) else 0)  # the failure has time to be known
        return to_device(batch, device)

    config = load_config(PretrainConfig, recipe, settings).config
    with (
        open_run(config) as run,
        mock.patch("pretrain.checkpoint.save.write_file", write_or_refuse),
        mock.patch("pretrain.checkpoint.save.RETRY_DELAYS", (0.01,)),
        mock.patch("pretrain.steps.to_device", note),
    ):
        outcome = train_with_tracking(run, "", StopSignal())
    checkpoints = [path.name for path in list_checkpoints(folder / "full")]
    whole = newest_intact(folder / "full")
    return {
        "outcome": outcome.name,
        "steps": [row["step"] for row in rows_of(folder / "full") if "train/loss" in row],
        "seen": seen_after,
        "checkpoints": checkpoints,
        "newest": whole[0].name if whole[0] else None,
        "faults": whole[1],
    }


def try_recipe(path: Path, folder: Path, recipe: Path) -> list[float]:
    """Take three steps by a published recipe at a thousandth of its scale; return the losses."""
    data = load_config(PretrainConfig, recipe).config.data
    settings = [
        f"run_dir={folder / 'recipes' / path.stem}",
        f"data.train={data.train}",
        f"data.validation={data.validation}",
        "data.num_workers=0",
        "model.hidden_size=24",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.image_size=64",
        "schedule.total_steps=3",
        "schedule.warmup_steps=1",
        "engine.global_batch_size=12",
        "engine.micro_batch_size=4",
        "engine.compile=false",
        "logging.every_steps=1",
        "tracking.uri=off",
    ]
    if path.stem.startswith("dinov2"):
        settings += ["objective.num_prototypes=64", "objective.head_hidden_size=24", "objective.local_image_size=32"]
    if path.stem.startswith("mae"):
        settings += ["objective.decoder_hidden_size=16", "objective.decoder_num_hidden_layers=1"]
        settings += ["objective.decoder_num_attention_heads=2", "objective.decoder_intermediate_size=32"]
    config = load_config(PretrainConfig, path, settings).config
    run_to_end(config)
    return [row["train/loss"] for row in rows_of(config.run_dir) if "train/loss" in row]


def die_in_a_save(recipe: Path, folder: Path) -> None:
    """Let the last rank die in the second save, before its part is written; its launcher ends the others."""
    config = load_config(PretrainConfig, recipe, [f"run_dir={folder / 'torn'}", "tracking.uri=off"]).config

    def write_or_die(path: Path, *arguments: Any) -> SavedFile:
        if LAST in str(path) and distributed.rank() == distributed.world_size() - 1:
            os._exit(9)
        return write_file(path, *arguments)

    with mock.patch("pretrain.checkpoint.save.write_file", write_or_die):
        run_to_end(config)


def average_as_stated(average: torch.Tensor, weight: torch.Tensor, updates: torch.Tensor | int) -> torch.Tensor:
    decay = min(EMA_DECAY, (1 + int(updates)) / (10 + int(updates)))
    return decay * average + (1 - decay) * weight


def split_by_layer(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str], decay: float, depth: int
) -> None:
    """Give each parameter a group, and a share of the learning rate by its layer."""
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            section, place, number = (names[parameter] + "...").split(".")[:3]
            above = depth - int(number) if place == "layers" else 0 if place == "norm" else depth + 1
            groups.append({**group, "params": [parameter], "share": decay**above if section == "encoder" else 1.0})
    optimizer.param_groups[:] = groups


def reference(recipe: Path, *overrides: str, steps: int | None = None) -> dict[str, Any]:
    """The losses and weights of a plain torch loop over the same samples: no DeepSpeed, no micro-batches."""
    config = load_config(PretrainConfig, recipe, ["run_dir=unused", *overrides]).config
    training = open_dataset(config.data.train)
    torch.manual_seed(config.seed)
    encoder = ViT(config.model)
    objective = build_objective(config.objective, encoder, training.class_shares, config.preprocessing).train()
    averaged = AveragedModel(objective, avg_fn=average_as_stated)
    optimizer = build_optimizer(objective, config.optimizer)
    if config.optimizer.layer_decay < 1:
        names = {parameter: name for name, parameter in objective.named_parameters()}
        split_by_layer(optimizer, names, config.optimizer.layer_decay, config.model.num_hidden_layers)
    schedule, batch_size = config.schedule, config.engine.global_batch_size
    losses = []
    batches = training_batches(
        training,
        objective.train_view(config.model.image_size),
        BatchPlan(seed=config.seed, shuffle_window=config.data.shuffle_window, global_batch_size=batch_size),
        start=0,
        stop=(schedule.total_steps if steps is None else steps) * batch_size,
    )
    for step, loaded in enumerate(batches):
        rate = learning_rate_at(
            step,
            peak=config.optimizer.peak_learning_rate(batch_size),
            final=schedule.final_learning_rate,
            warmup_steps=schedule.warmup_steps,
            total_steps=schedule.total_steps,
            name=schedule.name,
            cooldown_steps=schedule.cooldown_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        loss = objective(to_device(loaded.tensors, torch.device("cpu")))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.engine.gradient_clipping or math.inf)
        optimizer.step()
        losses.append(float(loss))
        averaged.update_parameters(objective)
    tensors = {"weights": objective.state_dict(), "averages": averaged.module.state_dict()}
    return {"losses": losses, **{kind: {name: digest(w) for name, w in each.items()} for kind, each in tensors.items()}}


def main(recipe: Path, folder: Path, source: Path | None) -> None:
    """Check every setting; then, if there is a source, what another world size left there."""
    start_distributed()
    seen: dict[str, Any] = {}
    if folder.name != "resharded":
        for name, overrides in (STAGES | OTHERS).items():
            if name == COMPILED_ELSEWHERE.get(distributed.world_size()):
                continue
            seen[name] = check(recipe, folder, name, overrides)
        if distributed.world_size() == 1:
            seen["reference"] = reference(recipe)
            seen["start"] = reference(recipe, steps=0)
            seen["decayed-reference"] = reference(recipe, DECAYED)
            seen["distil-start"] = reference(recipe, *DISTIL, steps=0)
            seen["lamb-reference"] = reference(recipe, *OTHERS["lamb0"])
            seen["muon-reference"] = reference(recipe, *OTHERS["muon0"])
            seen["recipes"] = {path.stem: try_recipe(path, folder, recipe) for path in RECIPES}
        seen["stopped"] = stop_in_an_evaluation(recipe, folder)
        seen["killed"] = {name: end_before_the_last_evaluation(recipe, folder, name) for name in ("stage1", "distil2")}
        seen["full"] = fail_in_a_save(recipe, folder)
    if source:
        seen["resharded"] = reshard(recipe, folder, source)
    if distributed.is_main():
        (folder / "seen.json").write_text(json.dumps(seen))
    if folder.name != "resharded":
        die_in_a_save(recipe, folder)


if __name__ == "__main__":
    recipe, folder, *others = (Path(argument) for argument in sys.argv[1:])
    main(recipe, folder, others[0] if others else None)
