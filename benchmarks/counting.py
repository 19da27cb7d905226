"""Count the operations of a piece of training, and find those for which the host would wait for a GPU."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.data.transforms.batch import Batch

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
# Operations whose result, or its shape, the host needs: on a GPU it would wait for everything that was queued before.
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
NOT_KERNELS = {aten.detach.default, aten.lift_fresh.default, aten.empty.memory_format, aten.empty_like.default}


class HostWaits:
    """Lists the host waits of the block that it surrounds, and counts its operations.

    It runs on a CPU, so it also counts reads of tensors that would be on the host anyway. A foreach or fused operation
    counts once.

    Attributes:
        waits: Operation and place in the code of each wait.
        num_operations: Number of operations that start kernels on a GPU.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.num_operations = 0
        self._modes = _Operations(self), _Calls(self)

    def __enter__(self) -> "HostWaits":
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def note(self, name: str) -> None:
        """Note a wait, with the innermost line of the project that causes it."""
        own = [frame for frame in traceback.extract_stack()[:-2] if frame.filename.startswith(str(ROOT))]
        # An environment inside of the checkout has the files of other packages.
        frames = [frame for frame in own if frame.filename != __file__ and "site-packages" not in frame.filename]
        place = f"{frames[-1].filename.removeprefix(f'{ROOT}/')}:{frames[-1].name}" if frames else "elsewhere"
        self.waits.append(f"{name} in {place}")


class _Operations(TorchDispatchMode):
    """Sees what reaches the device."""

    def __init__(self, found: HostWaits) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        masks = func in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func in READS or masks:
            self.found.note(str(func))
        elif not func.is_view and func not in NOT_KERNELS:
            self.found.num_operations += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Sees copies between host and device, which are no operations where the device is the CPU."""

    def __init__(self, found: HostWaits) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.tensor and options.get("device") is not None:
            self.found.note("torch.tensor on a device")
        elif func in (Tensor.cpu, Tensor.tolist, Tensor.numpy):
            self.found.note("copy to the host")
        elif func is Tensor.to and getattr(args[0], "is_on_host", False) and not options.get("non_blocking"):
            self.found.note("blocking copy")
        return func(*args, **options)


def mark_host_tensors(batch: Batch) -> None:
    """Mark the tensors of a batch, so that `HostWaits` treats copies of them as copies from the host."""
    for value in batch.values():
        if isinstance(value, dict):
            mark_host_tensors(cast(Batch, value))
        else:
            value.is_on_host = True  # type: ignore[attr-defined]
