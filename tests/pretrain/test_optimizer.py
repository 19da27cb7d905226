"""What is decayed, by name."""

from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.model.vit import ViT
from pretrain.optimizer import build_adamw


def test_weights_are_decayed_and_nothing_else() -> None:
    model = ViT(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16))
    decayed, undecayed = build_adamw(model, OptimizerConfig(weight_decay=0.3)).param_groups
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
    [group] = build_adamw(model, OptimizerConfig()).param_groups
    assert len(group["params"]) == 2
