"""Agree over all ranks on whether to stop, without waiting for what the device is doing now."""

import torch

from pretrain import distributed
from pretrain.device_copies import HostCopy


class DelayedFlag:
    """A flag that is true on all ranks if it was true on any of them, known one call later.

    The host needs the answer, but if it read the sum over the ranks at once, it would wait until the device has done
    all that was queued before. One call later the sum has long been copied to the host.

    Args:
        device: Device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._previous: HostCopy | None = None

    def any_over_ranks(self, value: bool) -> bool:
        """Send this rank's value; return whether the value of the previous call was true on any rank (collective).

        The first call returns False.
        """
        previous = self._previous
        own = torch.full((), float(value), device=self._device)  # a fill needs no copy from the host
        self._previous = HostCopy(distributed.sum_over_ranks(own))
        return previous is not None and previous.read().item() > 0
