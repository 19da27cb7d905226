"""With engine.deterministic, no operation is used that PyTorch refuses on a GPU, and cuBLAS is set up.

Without a GPU, the operations are counted: those that raise on CUDA are listed in the documentation of
`torch.use_deterministic_algorithms`. What the kernels compute has not yet been compared on a GPU.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import (
    HealthConfig,
    MAEConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreprocessingConfig,
    SupervisedConfig,
)
from pretrain.data.transforms.device_decode import collate
from pretrain.errors import UserError
from pretrain.health import Health
from pretrain.metrics.feature_rank import effective_rank
from pretrain.metrics.knn import predict_knn
from pretrain.metrics.linear_probe import predict_linear_probe
from pretrain.model.vit import ViT, resize_positions
from pretrain.objectives import build_objective
from pretrain.objectives.objective import Objective
from pretrain.optimizers import build_optimizer
from pretrain.startup import WORKSPACE_VARIABLE, make_deterministic
from tests.support.self_distillation import build_self_distillation

REFUSED_ON_GPUS = {
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "_ctc_loss_backward",
    "_upsample_bicubic2d_aa_backward",
    "_upsample_bilinear2d_aa_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "histc",
    "kthvalue",
    "max_unpool2d",
    "max_unpool3d",
    "median.dim",
    "nanmedian.dim",
    "nll_loss2d_backward",
    "nll_loss2d_forward",
    "put_",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}
EVERYTHING = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grayscale": 0.5,
    "solarize": 0.5,
    "blur": 0.5,
    "rand_augment_ops": 2,
    "erasing": 0.5,
}
MIXED = {**EVERYTHING, "mixup": 0.8, "cutmix": 1.0}
MODEL = ModelConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    mlp_ratio=2,
    patch_size=8,
    image_size=32,
    drop_path=0.4,
    dropout=0.1,
    layer_scale=0.1,
)
LARGER = 48  # image size at which positions are interpolated


class Operations(TorchDispatchMode):
    """Collect the names of the operations in its block that raise an error on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, overload = func.overloadpacket.__name__, func._overloadname
        self.seen.add(packet)
        is_sum_of_floats = packet == "cumsum" and args[0].is_floating_point()
        if {packet, f"{packet}.{overload}"} & REFUSED_ON_GPUS or is_sum_of_floats:
            self.refused.add(f"{packet}.{overload}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(WORKSPACE_VARIABLE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


def supervised(**changes: object) -> Objective:
    config = SupervisedConfig.model_validate({"label_smoothing": 0.1, "augment": MIXED, **changes})
    return objective(config, MODEL)


def objective(config: ObjectiveConfig, model: ModelConfig) -> Objective:
    torch.manual_seed(0)
    return build_objective(config, ViT(model), [0.1] * 10, PreprocessingConfig()).train()


def masked_autoencoder() -> Objective:
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = MAEConfig.model_validate({**decoder, "augment": EVERYTHING})
    return objective(config, MODEL.model_copy(update={"position_embedding": "sincos", "drop_path": 0.0}))


OBJECTIVES: dict[str, tuple[Callable[[], Objective], int]] = {
    "supervised": (supervised, 32),
    "larger images": (supervised, LARGER),
    "patch dropout": (lambda: supervised(patch_dropout=0.5), 32),
    "binary cross-entropy": (lambda: supervised(loss="binary_cross_entropy", class_weights=[1.0] * 10), 32),
    "mae": (masked_autoencoder, 32),
    "self_distillation": (lambda: build_self_distillation(augment=EVERYTHING), 32),  # its local crops are smaller
}


def batch_of(model: Objective, image_size: int) -> dict[str, Any]:
    random, view = np.random.default_rng(0), model.train_view(image_size)
    samples = [view(random.integers(0, 256, (60, 50, 3), dtype=np.uint8), random) for _ in range(8)]
    batch: dict[str, Any] = collate(samples)
    return {**batch, "label": torch.arange(8), "position": torch.arange(8)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_uses_no_operation_that_is_refused_on_gpus(name: str) -> None:
    build, image_size = OBJECTIVES[name]
    model = build()
    batch = batch_of(model, image_size)
    with Operations() as operations:
        model(batch)["loss"].backward()
    assert not operations.refused
    assert {"_scaled_dot_product_flash_attention_for_cpu_backward", "grid_sampler_2d"} <= operations.seen


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_optimizer_uses_no_operation_that_is_refused_on_gpus(name: str) -> None:
    model = supervised()
    optimizer = build_optimizer(model, OptimizerConfig.model_validate({"name": name}))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Operations() as operations:
        optimizer.step()
    assert operations.seen
    assert not operations.refused


def judge_steps() -> None:
    health = Health(HealthConfig(), torch.device("cpu"))
    for step in range(3):
        health.judge(torch.tensor(1.0), torch.tensor(1.0), 8 * step, stop_requested=False)
        health.end_step(step, 8 * step)


def probe() -> None:
    features, labels = torch.randn(40, 8), torch.arange(40) % 4
    effective_rank(features)
    predict_knn(features, labels, features)
    predict_linear_probe(features, labels, features)


@pytest.mark.parametrize("work", [judge_steps, probe], ids=lambda work: work.__name__)
def test_what_surrounds_training_uses_no_operation_that_is_refused_on_gpus(work: Callable[[], None]) -> None:
    with Operations() as operations:
        work()
    assert operations.seen
    assert not operations.refused


@pytest.mark.parametrize("sides", [(14, 7), (7, 14), (14, 6), (4, 4)])
def test_positions_and_their_gradient_equal_those_of_torch(sides: tuple[int, int]) -> None:
    """Two matrix products sum in another order: the tolerance is that of fp32."""
    old, new = sides
    torch.manual_seed(0)
    positions = torch.randn(1, 1 + old**2, 24, requires_grad=True)
    weight = torch.randn(1, 1 + new**2, 24)

    def resized() -> tuple[Tensor, Tensor]:
        result = resize_positions(positions, new)
        return result, torch.autograd.grad((result * weight).sum(), positions)[0]

    by_products = resized()
    torch.use_deterministic_algorithms(False)
    for ours, expected in zip(by_products, resized(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=3e-6)


def test_list_of_refused_operations_names_operations_of_torch() -> None:
    for name in REFUSED_ON_GPUS:
        packet, _, overload = name.partition(".")
        assert not overload or overload in getattr(torch.ops.aten, packet).overloads()


def test_operations_are_noticed() -> None:
    image = torch.randn(1, 1, 4, 4, requires_grad=True)
    with Operations() as operations:
        nn.functional.interpolate(image, size=8, mode="bicubic").sum().backward()
        torch.ones(3).cumsum(0)
        torch.ones(3, dtype=torch.long).cumsum(0)
        torch.ones(3).median()
    assert operations.refused == {"upsample_bicubic2d_backward.default", "cumsum.default"}


def test_process_is_set_up() -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ[WORKSPACE_VARIABLE] == ":4096:8"


def test_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE_VARIABLE, ":16:8")
    make_deterministic()
    assert os.environ[WORKSPACE_VARIABLE] == ":16:8"
    monkeypatch.setenv(WORKSPACE_VARIABLE, ":0:0")
    sentence = r"^CUBLAS_WORKSPACE_CONFIG=:0:0: .* conflicts with engine.deterministic=true; unset it or use :4096:8$"
    with pytest.raises(UserError, match=sentence):
        make_deterministic()
