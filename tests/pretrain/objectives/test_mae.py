"""The masked autoencoder equals the one of transformers, and it learns."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from pretrain.config import MAEConfig, ModelConfig, PreprocessingConfig
from pretrain.export.vit_mae import hub_mae_config
from pretrain.model.hub_names import decoder_to_hub, encoder_to_hub
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.objectives.mae import MAEObjective
from tests.support.overfitting import overfit

MODEL = ModelConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    patch_size=8,
    image_size=32,
    position_embedding="sincos",
)
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def build(**changes: object) -> MAEObjective:
    torch.manual_seed(0)
    config = MAEConfig.model_validate({**DECODER, **changes})
    objective = build_objective(config, ViT(MODEL), [], PreprocessingConfig())
    assert isinstance(objective, MAEObjective)
    return objective


def batch(size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "image": torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8),
        "patch_order": torch.stack([torch.randperm(16) for _ in range(size)]),
    }


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = {
        prefix: {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ("encoder.", "decoder.")
    }
    encoder = {f"vit.{name}": tensor for name, tensor in encoder_to_hub(parts["encoder."], MODEL).items()}
    return encoder | decoder_to_hub(parts["decoder."], MODEL)


def test_loss_and_gradients_equal_transformers() -> None:
    for changes in ({}, {"normalize_targets": False}, {"mask_ratio": 0.5}, {"mask_ratio": 0.7}):
        ours = build(**changes)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        theirs = transformers.ViTMAEForPreTraining(hub_mae_config(MODEL, ours.config)).train()
        theirs.load_state_dict(renamed(ours.state_dict()), strict=True)
        images, patch_order = torch.randn(6, 3, 32, 32), batch(6)["patch_order"]

        our_loss = ours.losses(images, patch_order).mean()
        their_loss = theirs(images, noise=patch_order.argsort(dim=1).float()).loss
        torch.testing.assert_close(our_loss, their_loss, rtol=1e-6, atol=1e-6)
        our_loss.backward()
        their_loss.backward()
        mapped = renamed({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
        wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
        assert mapped.keys() == wanted.keys()
        for name, gradient in mapped.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_initial_weights_have_the_distribution_of_the_paper() -> None:
    """The paper's code uses one layer for queries, keys and values, and torch's Xavier initialization everywhere."""
    objective = build()
    for name, module in objective.named_modules():
        if isinstance(module, nn.Linear):
            times = 3 if name.endswith(("q_proj", "k_proj", "v_proj")) else 1
            theirs = nn.init.xavier_uniform_(torch.empty(times * module.out_features, module.in_features))
            weight = module.weight.detach()
            assert float(weight.std()) == pytest.approx(float(theirs.std()), rel=0.05), name
            assert float(weight.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.02), name
            assert not module.bias.any()


def test_the_initial_loss_is_that_of_a_random_prediction() -> None:
    """Targets have variance 1; predictions have that of a linear layer with Xavier weights on normalized input."""
    width, pixels = DECODER["decoder_hidden_size"], 3 * 8 * 8
    expected = 1 + width * 2 / (width + pixels)
    assert float(build().train()(batch(64))["loss"]) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_one_batch_can_be_overfitted_and_every_parameter_is_trained() -> None:
    objective = build().train()
    rows = torch.linspace(0, 255, 32)
    smooth = torch.stack([torch.outer(rows.roll(i), rows.flip(0)) / 255 for i in range(8)])[:, None].expand(
        -1, 3, -1, -1
    )
    data = {**batch(8), "image": smooth.to(torch.uint8)}
    assert overfit(objective, data, steps=250) < 0.1


def test_masks_depend_on_the_random_generator_only_and_leave_the_pixels_unchanged() -> None:
    view = build().train_view(32)
    image = np.random.default_rng(3).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    first, again, other = (view(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first["patch_order"], again["patch_order"])
    assert not np.array_equal(first["patch_order"], other["patch_order"])
    assert sorted(first["patch_order"]) == list(range(16))
    plain = view.view(image, np.random.default_rng(1))  # type: ignore[attr-defined]
    assert all(np.array_equal(first[name], plain[name]) for name in plain)


def test_evaluation_sums_ignore_samples_with_weight_zero() -> None:
    objective, data = build().eval(), batch(8)
    sums = objective({**data, "weight": torch.tensor([1.0] * 5 + [0.0] * 3)})
    first = objective({name: tensor[:5] for name, tensor in data.items()} | {"weight": torch.ones(5)})
    torch.testing.assert_close(sums["loss"], first["loss"])
