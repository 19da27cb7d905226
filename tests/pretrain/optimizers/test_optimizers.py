"""Which parameters have weight decay; LAMB, Muon and layer-wise decay compared with reference implementations."""

import copy
import math
from typing import Literal

import pytest
import torch
import transformers
from torch import nn

from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.model.vit import ViT
from pretrain.optimizers import build_optimizer
from pretrain.optimizers.lamb import LAMB
from pretrain.optimizers.layer_decay import apply_layer_decay, layer_factors
from pretrain.optimizers.muon import orthogonalize
from pretrain.optimizers.placement import Placement, Range


def test_weight_decay_applies_to_weights_only() -> None:
    model = ViT(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16))
    decayed, undecayed = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0.0)
    assert sorted(names[id(p)] for p in decayed["params"]) == sorted(
        ["patch_embedding.weight", "layers.0.mlp.fc1.weight", "layers.0.mlp.fc2.weight"]
        + [f"layers.0.attention.{name}_proj.weight" for name in "qkvo"]
    )
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)


def test_frozen_parameters_are_in_no_group() -> None:
    model = ViT(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16))
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    [group] = build_optimizer(model, OptimizerConfig()).param_groups
    assert len(group["params"]) == 2


def reference_lamb(weights: torch.Tensor, gradients: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Return one parameter after LAMB steps by Algorithm 2 of arXiv 1904.00962, with the identity for phi."""
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    for t, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        ratio = (first / (1 - 0.9**t)) / ((second / (1 - 0.99**t)).sqrt() + 1e-6)
        direction = ratio + decay * weights
        trust = weights.norm() / direction.norm() if decay else 1.0
        weights = weights - 0.01 * trust * direction
    return weights


def test_lamb_equals_algorithm_2_whole_and_partitioned_and_skips_bad_steps() -> None:
    torch.manual_seed(0)
    whole, other = torch.randn(4, 6), torch.randn(7)
    gradients = [(torch.randn(4, 6), torch.randn(7)) for _ in range(5)]
    expected = [
        reference_lamb(weights, [pair[i] for pair in gradients], decay)
        for i, (weights, decay) in enumerate([(whole, 0.1), (other, 0.0)])
    ]
    for is_flat in (False, True):
        if is_flat:  # as ZeRO lays parameters out: one flat tensor of two ranges, with padding
            tensors = [torch.cat([whole.flatten(), torch.zeros(2)]), other.clone()]
        else:
            tensors = [whole.clone(), other.clone()]
        groups = [{"params": [tensors[0]], "weight_decay": 0.1}, {"params": [tensors[1]], "weight_decay": 0.0}]
        optimizer = LAMB(groups, lr=0.01, betas=(0.9, 0.99))
        if is_flat:
            ranges = {tensors[0]: [Range(0, 0, 0, 10), Range(0, 10, 10, 14)], tensors[1]: [Range(1, 0, 0, 7)]}
            optimizer.bind(Placement(["whole", "other"], [[4, 6], [7]], ranges))
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


def test_muon_equals_torchs_up_to_precision() -> None:
    """The difference is that torch always orthogonalizes in bf16, hence the tolerance."""
    torch.manual_seed(0)
    for shape in ((24, 16), (16, 40)):
        module = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(*shape, bias=False)])})
        [ours] = module.parameters()
        theirs = nn.Parameter(ours.detach().clone())
        before = theirs.detach().clone()
        config = OptimizerConfig(name="muon", learning_rate=0.02, weight_decay=0.1)
        one = build_optimizer(module, config)
        two = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for _ in range(4):
            ours.grad = theirs.grad = torch.randn_like(ours)
            one.step()
            two.step()
        moved, expected = ours - before, theirs - before
        assert (moved - expected).norm() < 0.03 * expected.norm()


def test_lamb_updates_a_parameter_whose_first_gradient_comes_late() -> None:
    early, late = torch.ones(2, 2), torch.ones(2, 2)
    optimizer = LAMB([early, late], lr=0.1, weight_decay=0.1)
    early.grad = torch.ones(2, 2)
    optimizer.step()
    late.grad = torch.ones(2, 2)
    optimizer.step()
    assert float(late.mean()) == pytest.approx(0.9)  # the update has the norm of the parameter times the learning rate


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((20, 20), (8, 30), (30, 8)):
        for precision in (torch.float32, torch.bfloat16):  # GPUs use the latter
            found = orthogonalize(torch.randn(2, *shape), precision)
            assert found.dtype == torch.float32
            singular = torch.linalg.svdvals(found) / (0.2 * math.sqrt(max(shape)))
            assert float(singular.min()) > 0.3
            assert float(singular.max()) < 1.3


def test_muon_orthogonalizes_matrices_of_blocks_only_and_skips_bad_steps() -> None:
    torch.manual_seed(0)
    model = ViT(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16))
    reference = copy.deepcopy(model)
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1}
    muon = build_optimizer(model, OptimizerConfig(name="muon", **settings))
    adamw = build_optimizer(reference, OptimizerConfig(**settings))
    for step in range(3):
        bad = step == 1
        muon.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            ours.grad = theirs.grad = torch.full_like(ours, torch.nan) if bad else torch.randn_like(ours)
        muon.step()
        if not bad:
            adamw.step()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        same = torch.allclose(ours, theirs, atol=1e-6)
        assert same == (not (name.startswith("layers.") and ours.ndim == 2)), name


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_layer_decay_equals_a_parameter_group_per_layer(
    name: Literal["adamw", "lamb", "muon"],
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 16}
    model = nn.ModuleDict({"encoder": ViT(ModelConfig.model_validate(sizes)), "classifier": nn.Linear(16, 3)})
    reference = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    config = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1)
    ours, theirs = build_optimizer(model, config), build_optimizer(reference, config)
    groups = len(ours.param_groups)
    apply_layer_decay(ours, Placement.unpartitioned(model.named_parameters()), 0.5)
    assert len(ours.param_groups) == groups <= 3
    factors = {"encoder.layers.2.": 0.5, "encoder.layers.1.": 0.25, "encoder.layers.0.": 0.125, "encoder.norm": 1.0}
    factors |= {"encoder.": 0.0625, "classifier.": 1.0}
    split = []
    for group in theirs.param_groups:
        for parameter in group["params"]:
            name_of = next(n for n, p in reference.named_parameters() if p is parameter)
            factor = next(factor for prefix, factor in factors.items() if name_of.startswith(prefix))
            split.append({**group, "params": [parameter], "lr": 1e-2 * factor})
    theirs.param_groups[:] = split
    for _ in range(3):
        for one, two in zip(model.parameters(), reference.parameters(), strict=True):
            one.grad = two.grad = torch.randn_like(one)
        ours.step()
        theirs.step()
    for key, one, two in zip(names, model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7, msg=key)


def test_layer_factors_of_transformers_models() -> None:
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
    vit = layer_factors([name for name, _ in transformers.ViTForImageClassification(config).named_parameters()], 0.5)
    assert {*vit} == {0.125, 0.25, 0.5, 1.0}
    assert vit.count(1.0) == 4  # the last norm and the classifier
    names = [
        "resnet.embedder.embedder.convolution.weight",
        "resnet.encoder.stages.1.layers.0.convolution.weight",
    ]
    assert layer_factors([*names, "classifier.1.weight", "decoder.layers.0.norm.weight"], 0.5) == [0.125, 0.5, 1.0, 1.0]
