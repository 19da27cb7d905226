"""Parameters that classification never uses, for which torch's DistributedDataParallel would search in each step."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

NUM_IMAGES = 2  # batch normalization in training mode needs more than one value per channel


def freeze_unused_parameters(classifier: Any, image_size: int) -> bool:
    """Freeze the parameters that no output depends on, such as DINOv2's mask token.

    They have no gradient, so no optimizer would change them, and DistributedDataParallel would wait for their gradients
    forever unless it searched for them in each step. The model, its buffers and the random state stay as they are.

    Args:
        classifier: Hugging Face classifier.
        image_size: Height and width of its input in pixels.

    Returns:
        Whether training uses other parameters than evaluation. Then they may also differ from step to step, and the
        search remains necessary.
    """
    trained = used_parameters(classifier, image_size, training=True)
    evaluated = used_parameters(classifier, image_size, training=False)
    for name, parameter in classifier.named_parameters():
        if name not in trained | evaluated:
            parameter.requires_grad_(False)
    return trained != evaluated


def used_parameters(classifier: nn.Module, image_size: int, *, training: bool) -> set[str]:
    """Return the names of the trainable parameters that have a gradient.

    Args:
        classifier: Hugging Face classifier.
        image_size: Height and width of its input in pixels.
        training: Whether to run it in training mode.
    """
    parameters = {name: value for name, value in classifier.named_parameters() if value.requires_grad}
    buffers = {name: value.clone() for name, value in classifier.named_buffers()}  # statistics that a pass would change
    device = next(iter(parameters.values())).device
    pixels = torch.zeros(NUM_IMAGES, 3, image_size, image_size, device=device)
    was_training = classifier.training
    classifier.train(training)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            logits = functional_call(classifier, buffers, kwargs={"pixel_values": pixels}).logits
        gradients = torch.autograd.grad(logits.sum(), [*parameters.values()], allow_unused=True)
    finally:
        classifier.train(was_training)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
