"""The model card of a fine-tuned model."""

from finetune.config import FinetuneConfig
from finetune.evaluate import Evaluation

CARD = """---
library_name: transformers
pipeline_tag: image-classification
tags: [vision, vitrail]
---

# {name}

This model has the {origin} `{model}`. It was fine-tuned with Vitrail on {num_images} images of {num_classes} classes.

| metric | value |
|---|---|
| top-1 accuracy on {num_validation} validation images | {top1:.4f} |
| epoch | {epoch} of {epochs}, the one with the best accuracy |
"""


def model_card(config: FinetuneConfig, *, num_images: int, num_classes: int, evaluation: Evaluation, epoch: int) -> str:
    """Return the README.md of a fine-tuned model.

    Args:
        config: Resolved run configuration.
        num_images: Number of training images.
        num_classes: Number of classes.
        evaluation: Result of the saved model.
        epoch: Epoch after which the model was saved.
    """
    return CARD.format(
        name=config.run_dir.name,
        origin="architecture, but not the weights, of" if config.from_scratch else "backbone of",
        model=config.model,
        num_images=num_images,
        num_classes=num_classes,
        num_validation=evaluation.num_samples,
        top1=evaluation.top1,
        epoch=epoch,
        epochs=config.schedule.epochs,
    )
