"""Parameters that classification never uses are found once and frozen, without changing anything else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.backbone import new_classifier
from finetune.unused import freeze_unused_parameters, used_parameters
from tests.support.classifiers import save_classifier, tiny_configs

UNUSED = {
    "dinov2": "dinov2.embeddings.mask_token",
    "clip": "vision_model.post_layernorm.",
    "siglip": "vision_model.head.",
}


def classifier_of(architecture: str, folder: Path) -> Any:
    save_classifier(tiny_configs()[architecture], folder)
    return new_classifier(folder, ["a", "b", "c"], from_scratch=False, freeze_backbone=False).train()


@pytest.mark.parametrize("architecture", tiny_configs())
def test_exactly_what_has_no_gradient_is_frozen(architecture: str, tmp_path: Path) -> None:
    classifier = classifier_of(architecture, tmp_path)
    untouched, random = copy.deepcopy(classifier), torch.random.get_rng_state()
    assert not freeze_unused_parameters(classifier, 32)
    assert classifier.training
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name]), name
    untouched(pixel_values=torch.rand(4, 3, 32, 32)).logits.square().sum().backward()
    unused = {name for name, value in untouched.named_parameters() if value.grad is None}
    assert {name for name, value in classifier.named_parameters() if not value.requires_grad} == unused
    assert {name.startswith(UNUSED.get(architecture, "none")) for name in unused} <= {True}
    assert bool(unused) == (architecture in UNUSED)


def test_a_frozen_backbone_stays_frozen(tmp_path: Path) -> None:
    save_classifier(tiny_configs()["vit"], tmp_path)
    classifier: Any = new_classifier(tmp_path, ["a", "b"], from_scratch=False, freeze_backbone=True)
    assert not freeze_unused_parameters(classifier, 32)
    trainable = [name for name, value in classifier.named_parameters() if value.requires_grad]
    assert trainable == ["classifier.weight", "classifier.bias"]


def test_a_model_that_trains_other_parameters_than_it_evaluates_needs_the_search(tmp_path: Path) -> None:
    classifier = classifier_of("vit", tmp_path)
    last: nn.Module = classifier.vit.layers[-1]
    last.register_forward_hook(lambda layer, inputs, output: inputs[0] if layer.training else output)
    assert freeze_unused_parameters(classifier, 32)
    assert all(value.requires_grad for value in classifier.parameters())
    skipped = {name for name, _ in classifier.named_parameters() if name.startswith("vit.layers.1.")}
    trained, evaluated = (used_parameters(classifier, 32, training=training) for training in (True, False))
    assert evaluated - trained == skipped
