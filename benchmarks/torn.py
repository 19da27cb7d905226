"""Three hundred damaged checkpoints: what is loaded from them, beside DeepSpeed's and torch's own.

    python benchmarks/torn.py                           # one rank, a tiny model, about two minutes

Each run has two checkpoints, and one file of the newer one is damaged: cut (a save that was killed), a bit flipped, its
tail overwritten (a disk that was full), or gone. Then the run is loaded as each tool does it. "Right" is the newest
checkpoint that is whole, its weights bit for bit; "refused" an error that leaves it to a person; "wrong" other weights,
without a word.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from pretrain.checkpoint.history import checkpoints_folder
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.pieces import load_weights
from pretrain.checkpoint.restore import newest_whole
from pretrain.checkpoint.save import Saver
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engine import build_engine, start_distributed

KINDS = ("cut", "flipped", "zeroed", "gone")


class Objective(nn.Module):
    """Something small to train."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    def forward(self, values: Tensor) -> Tensor:
        loss: Tensor = self.layers(values).square().mean()
        return loss


def damage(folder: Path, chance: random.Random) -> str:
    """Damage one file of a folder; return how."""
    kind = chance.choice(KINDS)
    victim = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = bytearray(victim.read_bytes())
    if kind == "gone":
        victim.unlink()
    elif kind == "cut":
        victim.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        victim.write_bytes(data)
    else:
        start = chance.randrange(len(data))
        victim.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    return kind


def weights_of(engine: Any) -> dict[str, Tensor]:
    """Return a copy of the weights."""
    return {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Say whether two models are the same, bit for bit."""
    return all(torch.equal(found[name].view(-1), weight.view(-1)) for name, weight in expected.items())


def make_runs(engine: Any, work: Path) -> dict[int, dict[str, Tensor]]:
    """Save after one step and after two, in all three ways; return the weights of those moments."""
    moments = {}
    saver = Saver(work / "ours", keep_last=2)
    for step in (1, 2):
        engine.backward(engine(torch.randn(8, 64)))
        engine.step()
        moments[step] = weights_of(engine)
        saver.begin(engine, Manifest(step, step, 1, "", [], {}, None))
        saver.finish()
        engine.save_checkpoint(str(work / "deepspeed"), tag=f"step-{step}")
        dcp.save(weights_of(engine), checkpoint_id=work / "dcp" / str(step))
    return moments


def load_ours(run: Path) -> dict[str, Tensor]:
    """Load what a continued run would."""
    checkpoint, _ = newest_whole(run)
    if checkpoint is None:
        raise FileNotFoundError
    return load_weights(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300)
    count = parser.parse_args().faults
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    start_distributed()
    config = EngineConfig(zero_stage=1, precision="fp32", global_batch_size=8, micro_batch_size=8)
    engine = build_engine(Objective(), config, OptimizerConfig())

    def load_deepspeed(run: Path) -> dict[str, Tensor]:
        path, _ = engine.load_checkpoint(str(run))
        if path is None:
            raise FileNotFoundError
        return weights_of(engine)

    def load_dcp(run: Path) -> dict[str, Tensor]:
        state = {name: torch.zeros_like(weight) for name, weight in weights_of(engine).items()}
        dcp.load(state, checkpoint_id=max(run.iterdir()))
        return state

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        moments = make_runs(engine, work)
        tools: dict[str, tuple[Path, Path, Callable[[Path], dict[str, Tensor]]]] = {
            "ours": (work / "ours", checkpoints_folder(Path()) / "step-00000002", load_ours),
            "DeepSpeed, `latest`": (work / "deepspeed", Path("step-2"), load_deepspeed),
            "torch dcp, newest folder": (work / "dcp", Path("2"), load_dcp),
        }
        print("| | right | refused | wrong, without a word |\n|---|---|---|---|")
        for tool, (run, newest, load) in tools.items():
            chance, outcomes = random.Random(0), Counter[str]()
            for number in range(count):
                copy = Path(shutil.copytree(run, work / "copy" / str(number)))
                damage(copy / newest, chance)
                try:
                    found = load(copy)
                except (Exception, CheckpointException):  # torch's own is no Exception
                    outcomes["refused"] += 1
                else:
                    right = equal(found, moments[1]) or (tool != "ours" and equal(found, moments[2]))
                    outcomes["right" if right else "wrong"] += 1
                shutil.rmtree(copy)
            print(f"| {tool} | {outcomes['right']} | {outcomes['refused']} | {outcomes['wrong']} |")


if __name__ == "__main__":
    main()
