"""The model card of a fine-tuned model. A test runs its code."""

from finetune.config import FinetuneConfig
from finetune.evaluate import Evaluation
from pretrain.card import USAGE_OF_CLASSIFIER, class_list, config_json, data_names, front_matter, versions
from pretrain.data.dataset.dataset import Dataset
from pretrain.tracking.tracker import git_commit

CARD = """{front_matter}

# {name}

This model has the {origin} `{model}`, of type `{model_type}` in transformers. It was fine-tuned with Vitrail on
{num_images} images.

It classifies images into {classes}

## Usage

{usage}

## Accuracy

| on the validation data `{validation}` | value |
|---|---|
| top-1 accuracy on {num_validation} images | {top1:.4f} |
| loss | {loss:.4f} |
| epoch | {epoch} of {epochs}, the one with the best accuracy |

## Training

| | |
|---|---|
| data | `{data}` |
| data digest | `{digest}` |
| code of the run | `{commit}` |
| written by | {versions} |

## Configuration

Paths and URLs are left out.

```json
{config}
```
"""


def model_card(config: FinetuneConfig, model_type: str, training: Dataset, evaluation: Evaluation, epoch: int) -> str:
    """Return the README.md of a fine-tuned model.

    Args:
        config: Resolved run configuration.
        model_type: Architecture of the model, as transformers names it.
        training: Training data.
        evaluation: Result of the saved model.
        epoch: Epoch after which the model was saved.
    """
    validation = data_names(config.data.validation)
    return CARD.format(
        front_matter=front_matter(
            config.run_dir.name, [model_type], is_classifier=True, data=validation, top1=evaluation.top1
        ),
        name=config.run_dir.name,
        origin="architecture, but not the weights, of" if config.from_scratch else "backbone of",
        model=config.model.name,
        model_type=model_type,
        num_images=sum(training.shard_sizes),
        classes=class_list(training.class_names),
        usage=USAGE_OF_CLASSIFIER,
        validation=validation,
        num_validation=evaluation.num_samples,
        top1=evaluation.top1,
        loss=evaluation.loss,
        epoch=epoch,
        epochs=config.schedule.epochs,
        data=data_names(config.data.train),
        digest=training.digest,
        commit=git_commit(),
        versions=versions(),
        config=config_json(config),
    )
