"""An exponential moving average of the weights, kept by each rank in fp32 for its own shard.

It lies in the optimizer's state beside the moments, so it is saved, restored and given to other ranks as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.engine.deepspeed import Engine
from pretrain.engine.partitions import EMA, refresh


class Ema:
    """The average after step t is decay * average + (1 - decay) * weights, with decay = min(decay, (1 + t) / (10 + t)).

    The growing decay (as in TensorFlow's ExponentialMovingAverage) lets a short run forget where it began.

    Args:
        engine: whose optimizer holds the weights.
        decay: between 0 and 1; 0: no average is kept.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.states = getattr(engine.optimizer, "optimizer", engine.optimizer).state
        if not decay:
            for state in self.states.values():
                state.pop(EMA, None)

    @torch.no_grad()
    def update(self, step: int, bad: Tensor) -> None:
        """Follow the weights after an optimizer step.

        Args:
            step: counted from 0.
            bad: 1 where the step was skipped, else 0; a scalar on the device.
        """
        if not self.decay:
            return
        share = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - bad)
        for master, state in self.states.items():
            if EMA in state:
                state[EMA].lerp_(master.detach(), share.to(master))
            else:
                state[EMA] = master.detach().clone()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the average for a while; every rank must enter, and come out again."""
        self._swap()
        yield  # what goes wrong in here ends the run, so the weights need not come back
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        averages = [(master.detach(), state[EMA]) for master, state in self.states.items() if EMA in state]
        for master, average in averages:
            weights = master.clone()
            master.copy_(average)
            average.copy_(weights)
        if averages:
            refresh(self.engine)
