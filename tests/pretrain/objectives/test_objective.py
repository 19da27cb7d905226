"""The interface that all objectives share."""

from collections.abc import Callable

import pytest
import torch

from pretrain.config import (
    MAEConfig,
    ModelConfig,
    ObjectiveConfig,
    PreprocessingConfig,
    SelfDistillationConfig,
    SupervisedConfig,
)
from pretrain.model.vit import ViT
from pretrain.objectives import OBJECTIVES, build_objective
from pretrain.objectives.objective import Objective

MODEL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=8, image_size=32
)
CONFIGS: dict[str, ObjectiveConfig] = {
    "supervised": SupervisedConfig(),
    "mae": MAEConfig(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2),
    "self_distillation": SelfDistillationConfig(
        num_local_crops=2, local_image_size=16, num_prototypes=16, head_hidden_size=16, head_bottleneck_size=8
    ),
}
ABSTRACT_METHODS = ("train_view", "evaluation_view", "train_losses", "evaluation_sums")


@pytest.mark.parametrize("missing", ABSTRACT_METHODS)
def test_a_subclass_without_an_abstract_method_cannot_be_instantiated(missing: str) -> None:
    methods: dict[str, Callable[..., object]] = {name: lambda *_: {} for name in ABSTRACT_METHODS}
    type("Complete", (Objective,), methods)()
    del methods[missing]
    with pytest.raises(TypeError, match=f"abstract method '?{missing}"):
        type("Incomplete", (Objective,), methods)()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_output_selects_what_forward_computes(name: str) -> None:
    torch.manual_seed(0)
    objective = build_objective(CONFIGS[name], ViT(MODEL), [0.5, 0.5], PreprocessingConfig()).eval()
    batch = {
        "image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
        "patch_order": torch.stack([torch.randperm(16) for _ in range(4)]),
        "label": torch.tensor([0, 1, 0, 1]),
        "weight": torch.ones(4),
    }
    with torch.no_grad():
        losses, features, pictures = (objective(batch, output=output) for output in ("losses", "features", "pictures"))
        cls_tokens = objective.encoder(objective.normalized_images(batch))[:, 0]
    assert losses["loss"].shape == ()
    assert losses.keys() == objective(batch).keys()
    torch.testing.assert_close(features["features"], cls_tokens)
    columns = {"supervised": 3, "mae": 5, "self_distillation": 3}[name]  # two attention heads; MAE adds two pictures
    assert pictures["pictures"].shape == (4, columns, 3, 32, 32)
    original, *others = objective.picture_headings()
    assert (original, len(others)) == ("original", columns - 1)
    assert (others[:2] == ["visible patches", "reconstruction"]) == (name == "mae")
    assert others[-2:] == ["head 1 attention", "head 2 attention"]
    assert 0 <= float(pictures["pictures"].min()) <= float(pictures["pictures"].max()) <= 1
    torch.testing.assert_close(pictures["pictures"][:, 0], batch["image"] / 255, rtol=0, atol=1e-5)
