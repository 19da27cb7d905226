"""An exponential moving average (EMA) of the weights. Each rank keeps it in fp32 for its own partition.

The average is part of the optimizer's state, next to the moments, so checkpoints save and reshard it in the same way.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.averaging import move_averages
from pretrain.engine.partitions import EMA, copy_masters_to_model
from pretrain.engine.protocol import TrainingEngine, torch_optimizer


class Ema:
    """The running average `average = d * average + (1 - d) * weights` with `d = min(decay, (1 + t) / (10 + t))`.

    The decay grows with the step t, as in TensorFlow's ExponentialMovingAverage, so that a short run soon forgets its
    random initial weights.

    Args:
        engine: Engine whose weights are averaged.
        decay: Upper limit of the decay, from 0 to 1. With 0 no average is kept, and a restored one is dropped.
    """

    def __init__(self, engine: TrainingEngine, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.states = torch_optimizer(engine).state
        if not decay:
            for state in self.states.values():
                state.pop(EMA, None)

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Move the average toward the weights after an optimizer step.

        Args:
            step: Number of the step, from 0.
            skipped: 1 if the step was skipped, which keeps the average as it is, else 0; a scalar on the device.
        """
        if not self.decay:
            return
        masters, averages = self._averaged()
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        move_averages(averages, masters, share, skipped)
        for master, state in self.states.items():
            if EMA not in state:
                state[EMA] = master.detach().clone()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Use the average as the model's weights inside the block (collective at entry and exit).

        An error inside the block ends the run, so the weights are not swapped back in that case.
        """
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        masters, averages = self._averaged()
        if averages:
            weights = [torch.empty_like(master) for master in masters]
            torch._foreach_copy_(weights, masters)
            torch._foreach_copy_(masters, averages)
            torch._foreach_copy_(averages, weights)
            copy_masters_to_model(self.engine)

    def _averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the masters that have an average, and their averages."""
        pairs = [(master.detach(), state[EMA]) for master, state in self.states.items() if EMA in state]
        return [master for master, _ in pairs], [average for _, average in pairs]
