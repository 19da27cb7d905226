"""Run by `test_deepspeed_version.py`: builds small engines on one rank and prints which attributes they have, as JSON.

The argument is a JSON object: for each setting the dotted names to look up, which start at `engine` or at
`parameter`, the first one of the model.
"""

import json
import sys
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engine.deepspeed import build_engine, start_distributed
from pretrain.engine.gradients import Gradients


class Square(nn.Module):
    """A model of one layer whose loss is the mean square of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(batch).square().mean()}


def has(root: object, path: str) -> bool:
    """Return whether a dotted name, in which `[0]` takes the first item, exists and is not None."""
    value: Any = root
    for name in path.split("."):
        if name == "[0]":
            value = next(iter(value.values() if isinstance(value, dict) else value))
        elif not hasattr(value, name):
            return False
        else:
            value = getattr(value, name)
    return value is not None


def look_up(setting: str, paths: list[str]) -> dict[str, bool]:
    """Take one step with an engine; return which of the names exist afterwards."""
    stage, precision, *rest = setting.split()
    config = EngineConfig(
        zero_stage=cast(Literal[0, 1, 2, 3], int(stage)),
        precision=cast(Literal["fp32", "bf16"], precision),
        global_batch_size=4,
        micro_batch_size=4,
        offload_optimizer=rest == ["offload"],
    )
    engine = build_engine(Square(), config, OptimizerConfig())
    batch = torch.ones(4, 4, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    gradients = Gradients(engine, max_norm=1.0)
    engine.backward(engine(batch)["loss"])  # type: ignore[arg-type]
    gradients.collect(is_last=True)
    assert float(gradients.squared_norm()) > 0
    engine.step()
    roots = {"engine": engine, "parameter": next(engine.module.parameters())}
    return {path: has(roots[path.partition(".")[0]], path.partition(".")[2]) for path in paths}


if __name__ == "__main__":
    start_distributed()
    print(json.dumps({setting: look_up(setting, paths) for setting, paths in json.loads(sys.argv[1]).items()}))
