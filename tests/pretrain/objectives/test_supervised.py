"""The supervised objective equals torch's losses, and it learns."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from pretrain.config import AugmentConfig, ModelConfig, PreprocessingConfig, PretrainConfig, SupervisedConfig
from pretrain.configfile import load_config
from pretrain.data.transforms.mixup import neighbors
from pretrain.errors import UserError
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.objectives.objective import Objective
from tests.support.overfitting import overfit

ROOT = Path(__file__).resolve().parents[3]
MODEL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=8, image_size=32
)


def build(classes: int = 10, smoothing: float = 0.0, **augment: float) -> Objective:
    torch.manual_seed(0)
    config = SupervisedConfig(label_smoothing=smoothing, augment=AugmentConfig(**augment))  # type: ignore[arg-type]
    return build_objective(config, ViT(MODEL), [1 / classes] * classes, PreprocessingConfig())


def batch(size: int, classes: int = 10, own_share: float = 1.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "image": torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8),
        "label": torch.arange(size) % classes,
        "mix_share": torch.full((size,), 1 - own_share),
        "cut_box": torch.zeros(size, 4),
    }


def test_the_initial_loss_is_the_log_of_the_number_of_classes() -> None:
    for classes in (2, 10, 1000):
        loss = build(classes).train()(batch(32, classes))["loss"]
        assert abs(loss - math.log(classes)) < 0.02 * math.log(classes)


def test_label_smoothing_mixes_in_the_uniform_distribution() -> None:
    objective, data = build(smoothing=0.2).train(), batch(8)
    loss = objective(data)["loss"]
    plain = build(smoothing=0.0).train()(data)["loss"]
    uniform = -F.log_softmax(_logits(objective, data), dim=1).mean()
    assert torch.allclose(loss, 0.8 * plain + 0.2 * uniform, atol=1e-6)


def test_mixup_is_the_cross_entropy_with_mixed_labels() -> None:
    objective, data = build(mixup=0.8).train(), batch(8, own_share=0.7)
    own, other = F.one_hot(data["label"], 10), F.one_hot(neighbors(data["label"]), 10)
    pixels = _normalized(data)
    logits = objective.logits(0.7 * pixels + 0.3 * neighbors(pixels))  # type: ignore[operator]
    expected = F.cross_entropy(logits, 0.7 * own + 0.3 * other)
    assert torch.allclose(objective(data)["loss"], expected, atol=1e-5)


def test_cutmix_mixes_the_labels_by_the_share_of_pixels() -> None:
    objective, data = build(cutmix=1.0).train(), batch(8)
    data["cut_box"] = torch.tensor([[0.0, 0.0, 0.5, 0.25]]).repeat(8, 1)  # the upper half of the left quarter
    pixels = _normalized(data)
    mixed = pixels.clone()
    mixed[:, :, :16, :8] = neighbors(pixels)[:, :, :16, :8]
    own, other = F.one_hot(data["label"], 10), F.one_hot(neighbors(data["label"]), 10)
    expected = F.cross_entropy(objective.logits(mixed), 0.875 * own + 0.125 * other)  # type: ignore[operator]
    assert torch.allclose(objective(data)["loss"], expected, atol=1e-5)


def test_binary_cross_entropy_equals_torch_on_mixed_and_smoothed_targets() -> None:
    torch.manual_seed(0)
    config = SupervisedConfig(loss="binary_cross_entropy", label_smoothing=0.2, augment=AugmentConfig(mixup=0.8))
    objective = build_objective(config, ViT(MODEL), [0.1] * 10, PreprocessingConfig()).train()
    data = batch(8, own_share=0.7)
    first = float(objective(data)["loss"])
    assert abs(first - math.log(2)) < 0.02
    smooth = 0.8 * F.one_hot(data["label"], 10) + 0.02
    pixels = _normalized(data)
    logits = objective.logits(0.7 * pixels + 0.3 * neighbors(pixels))  # type: ignore[operator]
    expected = F.binary_cross_entropy_with_logits(logits, 0.7 * smooth + 0.3 * neighbors(smooth))
    assert first == pytest.approx(float(expected), abs=1e-6)
    sums = objective.eval()({**data, "weight": torch.ones(8)})
    plain = F.binary_cross_entropy_with_logits(_logits(objective, data), F.one_hot(data["label"], 10).float())
    assert float(sums["loss"]) == pytest.approx(8 * float(plain), rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_class_weights_apply_to_both_labels_of_a_mixed_image(loss: str) -> None:
    """Both labels are smoothed, and each has the weight of its class."""
    weights = torch.linspace(0.1, 2.0, 10)
    given = {"loss": loss, "label_smoothing": 0.2, "class_weights": weights.tolist(), "augment": {"mixup": 0.8}}
    torch.manual_seed(0)
    config = SupervisedConfig.model_validate(given)
    objective = build_objective(config, ViT(MODEL), [0.1] * 10, PreprocessingConfig()).train()
    data = batch(8, own_share=0.7)
    pixels = _normalized(data)
    logits = objective.logits(0.7 * pixels + 0.3 * neighbors(pixels))  # type: ignore[operator]
    expected = torch.zeros(8)
    for share, labels in ((0.7, data["label"]), (0.3, neighbors(data["label"]))):
        targets = 0.8 * F.one_hot(labels, 10) + 0.02
        if loss == "cross_entropy":
            losses = F.cross_entropy(logits, targets, reduction="none")
        else:
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        expected += share * weights[labels] * losses
    assert float(objective(data)["loss"]) == pytest.approx(float(expected.mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("reduction", "bias", "expected"),
    [
        ("mean", 0.0, math.log(2)),
        ("sum", 0.0, 1000 * math.log(2)),
        ("sum", -10.0, 1000 * math.log1p(math.exp(-10)) + 10),  # the bias makes every class unlikely, also the true one
    ],
)
def test_the_initial_binary_cross_entropy_follows_from_the_bias(reduction: str, bias: float, expected: float) -> None:
    given = {"loss": "binary_cross_entropy", "loss_reduction": reduction, "head_bias": bias}
    config = SupervisedConfig.model_validate(given)
    objective = build_objective(config, ViT(MODEL), [1e-3] * 1000, PreprocessingConfig()).train()
    data = batch(32, 1000)
    loss = objective(data)["loss"]
    assert float(loss) == pytest.approx(expected, rel=0.02)
    sums = objective.eval()({**data, "weight": torch.ones(32)})
    assert float(sums["loss"]) == pytest.approx(32 * expected, rel=0.02)


def test_the_augreg_recipe_sums_over_classes() -> None:
    recipe = load_config(PretrainConfig, ROOT / "configs" / "pretrain" / "vit_l16_in21k_augreg.yaml").config.objective
    config = recipe.model_copy(update={"augment": AugmentConfig()})
    objective = build_objective(config, ViT(MODEL), [1 / 21841] * 21841, PreprocessingConfig()).train()
    expected = 21841 * math.log1p(math.exp(-10)) + 10
    assert float(objective(batch(8, 21841))["loss"]) == pytest.approx(expected, rel=0.02)


def test_a_sum_over_classes_is_their_number_times_the_mean() -> None:
    """big_vision's sigmoid_xent and timm's sum_classes sum, too."""
    gradients = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        given = {"loss": "binary_cross_entropy", "loss_reduction": reduction, "augment": {"mixup": 0.8}}
        config = SupervisedConfig.model_validate(given)
        objective = build_objective(config, ViT(MODEL), [0.1] * 10, PreprocessingConfig()).train()
        objective(batch(8, own_share=0.7))["loss"].backward()
        gradients.append(objective.get_parameter("classifier.weight").grad)
    torch.testing.assert_close(gradients[1], 10 * gradients[0])  # type: ignore[operator]


def test_balanced_class_weights_equal_those_of_scikit_learn() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())).float()
    config = SupervisedConfig(class_weights="balanced", augment=AugmentConfig(flip=0.0))
    objective = build_objective(config, ViT(MODEL), [0.6, 0.3, 0.1], PreprocessingConfig()).train()
    data = {**batch(10, 3), "label": labels}
    expected = F.cross_entropy(_logits(objective, data), labels, weight=weights, reduction="sum") / 10
    assert torch.allclose(objective(data)["loss"], expected, atol=1e-5)
    given = SupervisedConfig(class_weights=weights.tolist(), augment=AugmentConfig(flip=0.0))
    torch.testing.assert_close(
        build_objective(given, ViT(MODEL), [0.6, 0.3, 0.1], PreprocessingConfig()).class_weights, weights
    )
    with pytest.raises(
        UserError, match=r"objective\.class_weights: 3 weights for 2 classes; give one weight per class"
    ):
        build_objective(given, ViT(MODEL), [0.5, 0.5], PreprocessingConfig())


def test_patch_dropout_drops_patches_in_training_only() -> None:
    torch.manual_seed(0)
    config = SupervisedConfig(patch_dropout=0.3, augment=AugmentConfig(flip=0.0))
    objective = build_objective(config, ViT(MODEL), [0.1] * 10, PreprocessingConfig())
    data = {**batch(8), "patch_order": torch.stack([torch.randperm(16) for _ in range(8)])}
    visible = data["patch_order"][:, :12]  # 30 % of 16 are 4, rounded down
    tokens = objective.encoder(_normalized(data), visible)
    expected = F.cross_entropy(objective.classifier(tokens[:, 0]), data["label"])  # type: ignore[operator]
    assert torch.allclose(objective.train()(data)["loss"], expected, atol=1e-6)
    whole = F.cross_entropy(_logits(objective, data), data["label"], reduction="sum")
    assert torch.allclose(objective.eval()({**data, "weight": torch.ones(8)})["loss"], whole, atol=1e-4)
    drawn = objective.train_view(32)(np.zeros((40, 40, 3), np.uint8), np.random.default_rng(0))
    assert sorted(drawn["patch_order"]) == list(range(16))


def test_evaluation_sums_ignore_samples_with_weight_zero() -> None:
    objective, data = build().eval(), batch(8)
    logits = _logits(objective, data)
    sums = objective({**data, "weight": torch.tensor([1.0] * 5 + [0.0] * 3)})
    assert torch.allclose(sums["loss"], F.cross_entropy(logits[:5], data["label"][:5], reduction="sum"), atol=1e-4)
    assert sums["top1"] == (logits[:5].argmax(1) == data["label"][:5]).sum()


@pytest.mark.slow
def test_one_batch_can_be_overfitted_and_every_parameter_is_trained() -> None:
    objective, data = build().train(), batch(20)
    assert overfit(objective, data, steps=150) < 0.05


def _normalized(data: dict[str, torch.Tensor]) -> torch.Tensor:
    config = PreprocessingConfig()
    mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
    return (data["image"] / 255 - mean[:, None, None]) / std[:, None, None]


def _logits(objective: Objective, data: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = objective.logits(_normalized(data))  # type: ignore[operator]
    return logits
