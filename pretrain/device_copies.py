"""Copies of a few numbers between the host and the training device, for which neither waits.

A plain copy from the host (`torch.tensor(..., device=...)`) and any read of a device value (`.item()`, `.tolist()`,
`bool()`) makes the host wait until the device has done everything that was queued before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Return numbers as a float64 tensor on a device, copied from pinned memory so that the host does not wait."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=torch.float64, pin_memory=on_gpu).to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor to the host that has begun.

    Reading it waits for this copy only, not for what was queued on the device afterwards.

    Args:
        values: Tensor on any device; on a CPU it must not be changed in place afterwards.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> Tensor:
        """Return the tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
