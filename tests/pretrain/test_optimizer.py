"""What is decayed, by name."""

import torch

from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.model.vit import ViT
from pretrain.optimizer import LAMB, Range, build_optimizer


def test_weights_are_decayed_and_nothing_else() -> None:
    model = ViT(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16))
    decayed, undecayed = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0.0)
    assert sorted(names[id(p)] for p in decayed["params"]) == sorted(
        ["patch_embedding.weight", "layers.0.mlp.fc1.weight", "layers.0.mlp.fc2.weight"]
        + [f"layers.0.attention.{name}_proj.weight" for name in "qkvo"]
    )
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)


def test_frozen_parameters_are_left_out() -> None:
    model = ViT(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16))
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    [group] = build_optimizer(model, OptimizerConfig()).param_groups
    assert len(group["params"]) == 2


def lamb_of_the_paper(weights: torch.Tensor, gradients: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Algorithm 2 of arXiv 1904.00962, phi the identity, one parameter."""
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    for t, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        ratio = (first / (1 - 0.9**t)) / ((second / (1 - 0.99**t)).sqrt() + 1e-6)
        direction = ratio + decay * weights
        trust = weights.norm() / direction.norm() if decay else 1.0
        weights = weights - 0.01 * trust * direction
    return weights


def test_lamb_is_the_papers_also_in_pieces_and_passes_over_bad_steps() -> None:
    torch.manual_seed(0)
    whole, other = torch.randn(4, 6), torch.randn(7)
    gradients = [(torch.randn(4, 6), torch.randn(7)) for _ in range(5)]
    expected = [
        lamb_of_the_paper(weights, [pair[i] for pair in gradients], decay)
        for i, (weights, decay) in enumerate([(whole, 0.1), (other, 0.0)])
    ]
    for is_flat in (False, True):
        if is_flat:  # as ZeRO would: one tensor of both, and some padding
            tensors = [torch.cat([whole.flatten(), torch.zeros(2)]), other.clone()]
        else:
            tensors = [whole.clone(), other.clone()]
        groups = [{"params": [tensors[0]], "weight_decay": 0.1}, {"params": [tensors[1]], "weight_decay": 0.0}]
        optimizer = LAMB(groups, lr=0.01, betas=(0.9, 0.99))
        if is_flat:
            ranges = {tensors[0]: [Range(0, 0, 10), Range(0, 10, 14)], tensors[1]: [Range(1, 0, 7)]}
            optimizer.bind(ranges, 2, lambda squares: squares)
        optimizer.found_inf = torch.tensor(1.0)
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, torch.nan)
        optimizer.step()
        optimizer.found_inf = torch.tensor(0.0)
        for one, two in gradients:
            tensors[0].grad = torch.cat([one.flatten(), torch.zeros(2)]) if is_flat else one
            tensors[1].grad = two
            optimizer.step()
        torch.testing.assert_close(tensors[0].flatten()[:24], expected[0].flatten())
        torch.testing.assert_close(tensors[1], expected[1])
