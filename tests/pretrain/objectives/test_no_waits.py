"""The forward and backward pass of an objective never makes the host wait for the device.

On the meta device, an operation raises if the host needs a value. Copies from the host do not, so they are counted.
"""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.counting import HostWaits
from pretrain.config import MAEConfig, ModelConfig, PreprocessingConfig, SupervisedConfig
from pretrain.data.transforms.batch import Batch, to_device
from pretrain.data.transforms.device_decode import collate
from pretrain.data.transforms.views import View
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.objectives.objective import Objective

META = torch.device("meta")
NUM_CLASSES = 10
MODEL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
DROP_PATH = {"drop_path": 0.15, "layer_scale": 0.1}  # the second block masks its branches, the third takes a subset
COLORS = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1, "grayscale": 0.1, "solarize": 0.1}
AUGMENT = {**COLORS, "blur": 0.3, "erasing": 0.2}
MIXED = {**AUGMENT, "mixup": 0.8, "cutmix": 1.0}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # objective, model
    "plain": ({}, {}),
    "drop path": ({}, DROP_PATH),
    "dropout": ({}, {"dropout": 0.1, "attention_dropout": 0.1}),
    "patch dropout": ({"patch_dropout": 0.25}, {}),
    "colors, mixup and cutmix": ({"augment": MIXED, "label_smoothing": 0.1}, DROP_PATH),
    "rand_augment": ({"augment": {"rand_augment_ops": 2}}, {}),
    "three_augment": ({"augment": {"three_augment": True}}, {}),
    "balanced": ({"class_weights": "balanced", "augment": MIXED}, {}),
    "binary": ({"loss": "binary_cross_entropy", "augment": MIXED}, {}),
    "summed binary": ({"loss": "binary_cross_entropy", "loss_reduction": "sum"}, {}),
    "mae": ({"name": "mae", "augment": AUGMENT, **DECODER}, DROP_PATH | {"position_embedding": "sincos"}),
}


def build(config: dict[str, Any], model: dict[str, Any]) -> Objective:
    encoder = ViT(ModelConfig.model_validate({**MODEL, **model}))
    section = MAEConfig if config.get("name") == "mae" else SupervisedConfig
    return build_objective(
        section.model_validate(config), encoder, [1 / NUM_CLASSES] * NUM_CLASSES, PreprocessingConfig()
    )


def batch_of(view: View, device: torch.device) -> Batch:
    random = np.random.default_rng(0)
    batch = collate([view(random.integers(0, 256, (40, 50, 3), dtype=np.uint8), random) for _ in range(8)])
    return to_device(Batch(**batch, label=torch.zeros(8, dtype=torch.int64), weight=torch.ones(8)), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_training_needs_no_value_on_the_host(name: str, dtype: torch.dtype) -> None:
    objective = build(*CASES[name]).to(META).train()
    for parameter in objective.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers stay in fp32, as under DeepSpeed
    objective(batch_of(objective.train_view(32), META))["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in objective.parameters())


@pytest.mark.parametrize("name", CASES)
def test_training_copies_nothing_from_or_to_the_host(name: str) -> None:
    objective = build(*CASES[name]).train()
    batch = batch_of(objective.train_view(32), torch.device("cpu"))
    with HostWaits() as counted:
        objective(batch)["loss"].backward()
    assert counted.waits == []
    assert counted.num_operations > 100


@pytest.mark.parametrize("name", CASES)
def test_evaluation_needs_no_value_on_the_host(name: str) -> None:
    objective = build(*CASES[name]).to(META).eval()
    with torch.no_grad():
        sums = objective(batch_of(objective.evaluation_view(), META))
    assert all(value.is_meta and value.shape == () for value in sums.values())
