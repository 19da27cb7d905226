"""What each rank saves, and what optimizers learn about it; `test_train.py` checks both under ZeRO on real ranks."""

import pytest
import torch
from torch import nn

from pretrain.config import OptimizerConfig
from pretrain.engine.partitions import count_optimizer_steps, fragments_to_save, full_shapes, local_fragments
from pretrain.engine.placement import bind_optimizer, parameter_placement
from pretrain.engine.protocol import torch_optimizer
from pretrain.optimizers import build_optimizer
from pretrain.optimizers.lamb import LAMB
from tests.support.checkpoints import PlainEngine


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def after_a_step(model: nn.Module) -> PlainEngine:
    engine = PlainEngine.adamw(model)
    engine.take_step(lambda module: module(torch.randn(4, 3)).square().sum())
    return engine


def test_local_fragments_are_the_weights_the_moments_and_the_buffers() -> None:
    engine = after_a_step(small_model())
    fragments = {fragment.name: fragment for fragment in local_fragments(engine)}
    assert fragments.keys() == engine.module.state_dict().keys() == full_shapes(engine).keys()
    assert fragments["0.weight"].kinds == ("weight", "exp_avg", "exp_avg_sq")
    assert fragments["1.running_mean"].kinds == ("weight",)
    fragments["2.bias"].view("weight").fill_(7.0)  # the view is of the weight itself
    assert engine.module[2].bias.tolist() == [7.0, 7.0]  # type: ignore[index]
    assert count_optimizer_steps(engine) == 1


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_the_ranks_save_every_replicated_element_exactly_once(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    engine = after_a_step(small_model())
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    saved = {name: torch.full(shape, torch.nan).flatten() for name, shape in full_shapes(engine).items()}
    count = 0
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        for fragment in fragments_to_save(engine):
            saved[fragment.name][fragment.start : fragment.start + fragment.numel] = fragment.view("weight")
            count += fragment.numel
    assert count == sum(len(values) for values in saved.values())
    for name, value in engine.module.state_dict().items():
        assert torch.equal(saved[name], value.flatten().float())


def test_the_torch_optimizer_is_found_inside_a_zero_optimizer() -> None:
    engine = PlainEngine.adamw(small_model())
    inner = engine.optimizer
    assert torch_optimizer(engine) is inner
    engine.optimizer = type("ZeroOptimizer", (), {"optimizer": inner})()
    assert torch_optimizer(engine) is inner


def test_placement_without_zero_is_one_range_per_parameter() -> None:
    engine = PlainEngine.adamw(small_model())
    placement = parameter_placement(engine)
    assert placement.world_size == 1
    for name, parameter in engine.module.named_parameters():
        [(index, parameter_start, tensor_start, numel)] = placement.ranges[parameter]
        assert (placement.names[index], placement.shapes[index]) == (name, list(parameter.shape))
        assert (parameter_start, tensor_start, numel) == (0, 0, parameter.numel())


@pytest.mark.parametrize(
    ("options", "binds", "num_hooks"),
    [
        ({"name": "adamw"}, False, 0),
        ({"name": "adamw", "layer_decay": 0.5}, False, 1),
        ({"name": "lamb", "weight_decay": 0.1}, True, 0),
        ({"name": "lamb", "weight_decay": 0.1, "layer_decay": 0.5}, True, 1),
    ],
)
def test_optimizers_are_bound_to_the_placement_if_they_need_it(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], binds: bool, num_hooks: int
) -> None:
    bound: list[object] = []
    monkeypatch.setattr(LAMB, "bind", lambda _, placement: bound.append(placement))
    model, config = small_model(), OptimizerConfig.model_validate(options)
    engine = PlainEngine(model, build_optimizer(model, config))
    bind_optimizer(engine, config)
    assert bool(bound) == binds
    assert len(engine.optimizer._optimizer_step_pre_hooks) == num_hooks
