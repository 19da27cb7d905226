"""Our ViT equals transformers' with the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from pretrain.config import ModelConfig
from pretrain.model.hub_names import encoder_to_hub, fold_layer_scale, hub_encoder_config
from pretrain.model.vit import DropPath, ViT, patchify, sincos_positions

CONFIG = ModelConfig(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, patch_size=8, image_size=32
)


class Classifier(nn.Module):
    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.encoder = ViT(config)
        self.classifier = nn.Linear(config.hidden_size, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.encoder(images)[:, 0])
        return logits


def perturbed(config: ModelConfig) -> Classifier:
    """Return a model without initial values, so that no norm or bias is one or zero by chance."""
    torch.manual_seed(0)
    model = Classifier(config, 5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def renamed(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return a classifier's tensors by transformers' names."""
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("classifier.")}
    return {f"vit.{name}": tensor for name, tensor in encoder_to_hub(encoder, config).items()} | head


@pytest.mark.parametrize("size", [16, 24, 48])
def test_images_of_another_size_equal_transformers(size: int) -> None:
    ours = perturbed(CONFIG)
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(**hub_encoder_config(CONFIG), num_labels=5)
    ).eval()
    theirs.load_state_dict(renamed(ours.state_dict(), CONFIG), strict=True)
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        logits = ours(images)
        torch.testing.assert_close(logits, theirs(images, interpolate_pos_encoding=True).logits, rtol=1e-5, atol=1e-5)
        shuffled = torch.randperm((size // 8) ** 2).expand(3, -1)  # each patch keeps its own position
        torch.testing.assert_close(ours.classifier(ours.encoder(images, shuffled)[:, 0]), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"position_embedding": "sincos"}, {"layer_norm_eps": 1e-3}, {"mlp_ratio": 3.0, "intermediate_size": None}],
)
def test_logits_and_gradients_equal_transformers(changes: dict[str, object]) -> None:
    config = CONFIG.model_copy(update=changes)
    ours = perturbed(config)
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(**hub_encoder_config(config), num_labels=5)
    ).eval()
    theirs.load_state_dict(renamed(ours.state_dict(), config), strict=True)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 5

    our_logits, their_logits = ours(images), theirs(images).logits
    assert torch.allclose(our_logits, their_logits, atol=1e-6)
    F.cross_entropy(our_logits, labels).backward()
    F.cross_entropy(their_logits, labels).backward()
    our_gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    mapped = renamed(our_gradients, config)
    assert mapped.keys() == their_gradients.keys() - (
        {"vit.embeddings.position_embeddings"} if config.position_embedding == "sincos" else set()
    )
    for name, gradient in mapped.items():
        assert torch.allclose(gradient, their_gradients[name], atol=1e-6), name


def test_every_parameter_has_a_gradient() -> None:
    model = perturbed(CONFIG)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_layer_scale_is_folded_into_exported_weights() -> None:
    config = CONFIG.model_copy(update={"layer_scale": 1e-4})
    assert (ViT(config).layers[0].mlp_scale.weight == 1e-4).all()  # type: ignore[union-attr]
    ours = perturbed(config).encoder
    theirs = transformers.ViTModel(transformers.ViTConfig(**hub_encoder_config(config)), add_pooling_layer=False).eval()
    theirs.load_state_dict(encoder_to_hub(fold_layer_scale(ours.state_dict()), config), strict=True)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_cls_attention_equals_transformers() -> None:
    ours = perturbed(CONFIG).encoder
    hf_config = transformers.ViTConfig(**hub_encoder_config(CONFIG), attn_implementation="eager")
    theirs = transformers.ViTModel(hf_config, add_pooling_layer=False).eval()
    theirs.load_state_dict(encoder_to_hub(ours.state_dict(), CONFIG), strict=True)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(images, output_attentions=True).attentions[-1][:, :, 0, 1:]
        torch.testing.assert_close(ours(images, output="attention"), expected, rtol=1e-5, atol=1e-6)


def test_visible_patches_keep_their_positions() -> None:
    model, images = perturbed(CONFIG).encoder, torch.randn(3, 3, 32, 32)
    visible = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    whole, some = model.embed(images), model.embed(images, visible)
    assert torch.equal(some[:, 0], whole[:, 0])
    for i in range(3):
        torch.testing.assert_close(some[i, 1:], whole[i, 1:][visible[i]])
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(model(images, everything), model(images))


@pytest.mark.processes
def test_checkpointing_and_compiling_give_the_same_results() -> None:
    torch.manual_seed(0)
    plain = ViT(CONFIG.model_copy(update={"dropout": 0.1, "drop_path": 0.2}))
    checkpointed = ViT(plain.config, activation_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    images = torch.randn(3, 3, 32, 32)
    gradients = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        model(images).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("drop_path", [0.0, 0.1, 0.4])
def test_cls_alone_equals_the_first_of_all_tokens(drop_path: float) -> None:
    """In float64, because the products have other shapes and so another rounding."""
    torch.manual_seed(0)
    model = ViT(CONFIG.model_copy(update={"drop_path": drop_path, "layer_scale": 0.5})).double().train()
    images, found = torch.randn(6, 3, 32, 32, dtype=torch.float64), []
    for output in ("tokens", "cls"):
        torch.manual_seed(1)
        cls = model(images, output=output)[:, 0]
        found.append([cls, *torch.autograd.grad(cls.square().sum(), [*model.parameters()])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert model(images, output="cls").shape == (6, 1, CONFIG.hidden_size)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_drop_path_computes_kept_samples_and_preserves_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    drop_path, tokens = DropPath(rate).train(), torch.randn(20, 3, 4, requires_grad=True)
    sizes, total = [], torch.zeros(20, 3, 4)

    def branch(kept: torch.Tensor) -> torch.Tensor:
        sizes.append(len(kept))
        return 3 * kept

    for _ in range(600):
        total += drop_path(tokens, tokens, branch).detach() / 600
    assert set(sizes) == {12 if rate > 0.1 else 20}
    torch.testing.assert_close(total, 4 * tokens.detach(), atol=1e-6, rtol=0.15)
    once = drop_path(tokens, tokens, branch)
    factors = ((once - tokens) / (3 * tokens)).detach().mean(dim=(1, 2))
    kept = factors > 0.1
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - rate)))
    assert kept.sum() == 12 or rate == 0.1
    assert torch.equal(drop_path.eval()(tokens, tokens, branch), tokens + branch(tokens))
    [gradient] = torch.autograd.grad(once.sum(), tokens)
    torch.testing.assert_close(gradient.mean(dim=(1, 2)), 1 + 3 * factors)


def test_checkpointed_blocks_run_again_in_the_backward_pass() -> None:
    model = ViT(CONFIG, activation_checkpointing=True)
    runs = []
    for layer in model.layers:
        layer.norm_before.register_forward_hook(lambda *_: runs.append(1))
    loss = model(torch.randn(2, 3, 32, 32)).square().mean()
    forward = len(runs)
    loss.backward()
    assert (forward, len(runs)) == (CONFIG.num_hidden_layers, 2 * CONFIG.num_hidden_layers)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "drop_path"])
def test_each_kind_of_dropout_acts_only_in_training(name: str) -> None:
    model = perturbed(CONFIG.model_copy(update={name: 0.5}))
    images = torch.randn(2, 3, 32, 32)
    expected = perturbed(CONFIG).eval()(images)
    assert torch.equal(model.eval()(images), expected)
    assert not torch.allclose(model.train()(images), expected, atol=1e-3)


def test_drop_path_rises_with_depth() -> None:
    model = ViT(CONFIG.model_copy(update={"num_hidden_layers": 5, "drop_path": 0.2}))
    rates = [1 - float(layer.drop_path.keep) for layer in model.layers]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2], abs=1e-6)


def test_patch_embedding_equals_a_convolution() -> None:
    images, weight = torch.randn(2, 3, 24, 32), torch.randn(7, 3, 8, 8)
    theirs = F.conv2d(images, weight, stride=8).flatten(2).transpose(1, 2)
    assert torch.allclose(patchify(images, 8) @ weight.flatten(1).T, theirs, atol=1e-4)


def test_sincos_positions_have_the_published_layout() -> None:
    positions = sincos_positions(5, 64)[0]
    assert positions.shape == (26, 64)
    for row, column, k in [(0, 0, 3), (4, 2, 0), (1, 3, 9), (2, 4, 15)]:
        angles = column / 10000 ** (k / 16), row / 10000 ** (k / 16)  # the layout of MAE's released weights: x, then y
        expected = [math.sin(angles[0]), math.cos(angles[0]), math.sin(angles[1]), math.cos(angles[1])]
        assert positions[1 + 5 * row + column, k::16].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(positions[0], torch.zeros(64))
    similarity = positions[1:] @ positions[1:].T
    assert (similarity.argmax(dim=1) == torch.arange(25)).all()
    grid = similarity[12].reshape(5, 5)  # around the center: similarity falls with distance, equally in both directions
    assert torch.allclose(grid, grid.T, atol=1e-4)
    assert grid[2, 2] > grid[2, 3] > grid[2, 4]
