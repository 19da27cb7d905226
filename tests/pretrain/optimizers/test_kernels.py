"""What an optimizer step costs besides its arithmetic: kernels and waits of the host, counted; flags that it obeys."""

import copy
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.counting import HostWaits
from benchmarks.optimizer_step import build_step, join_groups
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.engine.ema import Ema
from pretrain.model.vit import ViT
from pretrain.optimizers import build_optimizer, muon
from pretrain.optimizers.layer_decay import apply_layer_decay
from pretrain.optimizers.placement import Placement, Range

NAMES = ("adamw", "lamb", "muon")
KERNELS = {"adamw": 10, "lamb": 35, "muon": 130}  # of a step with 198 tensors; the matrices of Muon have three shapes
LAYER_DECAY_KERNELS = 4
AVERAGE_KERNELS = 2


@pytest.fixture
def _fused_sgd_on_meta() -> Iterator[None]:
    """Let torch's fused SGD run on the meta device, for which torch has no kernel; it returns nothing."""
    library: Any = torch.library.Library("aten", "IMPL", "Meta")  # type: ignore[no-untyped-call]
    library.impl("_fused_sgd_", lambda *_, **__: None)
    yield
    library._destroy()


@pytest.mark.parametrize("is_flat", [False, True], ids=["whole", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_few_kernels_and_no_waits(name: str, is_flat: bool) -> None:
    for layer_decay, decay, more in ((1.0, 0.0, 0), (0.65, 0.0, LAYER_DECAY_KERNELS), (1.0, 0.9, AVERAGE_KERNELS)):
        step = build_step(name, layer_decay, decay, is_flat=is_flat)
        step()  # creates the state
        with HostWaits() as counted:
            step()
        assert counted.num_operations <= KERNELS[name] + more
        assert not counted.waits


@pytest.mark.usefixtures("_fused_sgd_on_meta")
@pytest.mark.parametrize("is_flat", [False, True], ids=["whole", "flat"])
@pytest.mark.parametrize("name", ["lamb", "muon"])  # torch's AdamW refuses the meta device
def test_a_step_runs_on_the_meta_device_where_no_value_can_be_read(name: str, is_flat: bool) -> None:
    step = build_step(name, 0.65, 0.9, is_flat=is_flat, device="meta")
    for _ in range(2):  # the first one creates the state
        step()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 16}
    return ViT(ModelConfig.model_validate(sizes))


def small_optimizer(name: str, *, is_flat: bool) -> Optimizer:
    """Return an optimizer with layer-wise decay for a small model."""
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig.model_validate({"name": name, "learning_rate": 1e-2}))
    placement = join_groups(optimizer, model) if is_flat else Placement.unpartitioned(model.named_parameters())
    if name != "adamw":
        optimizer.bind(placement)  # type: ignore[attr-defined]
    apply_layer_decay(optimizer, placement, 0.5)
    return optimizer


def tensors_of(optimizer: Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def take_step(optimizer: Any, gradients: list[Tensor], found_inf: float = 0.0, grad_scale: float | None = None) -> None:
    for tensor, gradient in zip(tensors_of(optimizer), gradients, strict=True):
        tensor.grad = gradient.clone()
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)
    optimizer.step()


def snapshot(optimizer: Optimizer) -> list[Tensor]:
    """Return copies of all weights and of the whole state."""
    tensors = tensors_of(optimizer)
    state = [value for tensor in tensors for _, value in sorted(optimizer.state[tensor].items())]
    return [value.detach().clone() for value in (*tensors, *state)]


@pytest.mark.parametrize("is_flat", [False, True], ids=["whole", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_with_nan_changes_nothing(name: str, is_flat: bool) -> None:
    optimizer = small_optimizer(name, is_flat=is_flat)
    engine: Any = SimpleNamespace(optimizer=optimizer)
    ema = Ema(engine, 0.9)
    nan = [torch.full_like(tensor, torch.nan) for tensor in tensors_of(optimizer)]
    weights = [tensor.detach().clone() for tensor in tensors_of(optimizer)]
    take_step(optimizer, nan, found_inf=1.0, grad_scale=float("nan"))  # also creates the state
    assert all(map(torch.equal, tensors_of(optimizer), weights))
    for step in range(3):
        take_step(optimizer, [torch.randn_like(tensor) for tensor in weights])
        ema.update(step, torch.tensor(0.0))
        before = snapshot(optimizer)
        take_step(optimizer, nan, found_inf=1.0, grad_scale=float("nan"))
        ema.update(step, torch.tensor(1.0))
        assert all(map(torch.equal, snapshot(optimizer), before))
    steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert steps == {3.0}


@pytest.mark.parametrize("is_flat", [False, True], ids=["whole", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_divided_by_grad_scale(name: str, is_flat: bool) -> None:
    ours, reference = (small_optimizer(name, is_flat=is_flat) for _ in range(2))
    for scale in (1.0, 3.0, 7.0):
        gradients = [torch.randn_like(tensor) for tensor in tensors_of(ours)]
        take_step(ours, gradients, grad_scale=scale)
        take_step(reference, [gradient / scale for gradient in gradients])
    assert all(map(torch.equal, snapshot(ours), snapshot(reference)))


class Ranks:
    """Threads that stand for ranks, with the collectives that optimizers use."""

    def __init__(self, count: int) -> None:
        self.values: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)
        self.number = threading.local()

    def gather(self, value: Any) -> list[Any]:
        self.values[self.number.rank] = value
        self.barrier.wait()
        found = [*self.values]
        self.barrier.wait()
        return found

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self.gather(values.clone())).sum(0)

    def run(self, rank: int, optimizer: Optimizer) -> None:
        self.number.rank = rank
        optimizer.step()


def partition(optimizer: Any, whole: Placement, rank: int, ranks: Ranks) -> None:
    """Leave an optimizer one of three partitions of each flat tensor; the last one is only padding.

    Args:
        optimizer: Optimizer whose tensors are flat.
        whole: Placement of the flat tensors.
        rank: Number of the partition.
        ranks: All ranks.
    """
    ranges: dict[Tensor, list[Range]] = {}
    for group in optimizer.param_groups:
        [flat] = group["params"]
        size = -(-flat.numel() // 2)
        part = torch.cat([flat, torch.zeros(3 * size - flat.numel())])[rank * size : (rank + 1) * size].clone()
        for index, _, start, numel in whole.ranges[flat]:
            first, last = max(start, rank * size), min(start + numel, (rank + 1) * size)
            if first < last:
                ranges.setdefault(part, []).append(Range(index, first - start, first - rank * size, last - first))
        group["params"] = [part]
    optimizer.bind(Placement(whole.names, whole.shapes, ranges, ranks.sum, rank, 3))


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_three_ranks_with_partitions_equal_one_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, model = Ranks(3), small_model()
    monkeypatch.setattr(muon, "gather", ranks.gather)
    config = OptimizerConfig.model_validate({"name": name, "learning_rate": 1e-2, "weight_decay": 0.1})
    whole = build_optimizer(model, config)
    placement = join_groups(whole, model)
    whole.bind(placement)  # type: ignore[attr-defined]
    partitioned: list[Optimizer] = []
    for rank in range(3):
        twin = copy.deepcopy(model)
        optimizer = build_optimizer(twin, config)
        partition(optimizer, join_groups(optimizer, twin), rank, ranks)
        partitioned.append(optimizer)
    for _ in range(3):
        take_step(whole, [torch.randn_like(tensor) for tensor in tensors_of(whole)])
        for group, tensor in enumerate(tensors_of(whole)):
            _hand_out(tensor.grad, [tensors_of(optimizer)[group] for optimizer in partitioned])
        threads = [threading.Thread(target=ranks.run, args=each) for each in enumerate(partitioned)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for group, tensor in enumerate(tensors_of(whole)):
        joined = torch.cat([tensors_of(optimizer)[group] for optimizer in partitioned])[: tensor.numel()]
        torch.testing.assert_close(joined, tensor, rtol=1e-5, atol=1e-6)


def _hand_out(gradient: Tensor | None, parts: list[Tensor]) -> None:
    assert gradient is not None
    padded = torch.cat([gradient, torch.zeros(sum(part.numel() for part in parts) - gradient.numel())])
    for part, piece in zip(parts, torch.split(padded, parts[0].numel()), strict=True):
        part.grad = piece.clone()
