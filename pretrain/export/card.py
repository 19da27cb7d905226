"""The model card of an exported folder. The tests run its code."""

from collections.abc import Mapping

from pretrain.card import class_list, config_json, data_names, front_matter, versions
from pretrain.checkpoint.manifest import Manifest
from pretrain.config import PretrainConfig
from pretrain.export.proof import Proof

CARD = """{front_matter}

# {title}

A Vision Transformer pretrained with Vitrail: {layers} layers of width {width}, for images of {size} x {size} pixels in
patches of {patch} x {patch}.

{classes}

## Usage

{usage}

## Accuracy

| on the validation data `{validation}`, at step {step} | value |
|---|---|
{accuracy}

## Training

| | |
|---|---|
| objective | {objective} |
| optimizer steps | {step} |
| images seen | {images_seen} |
| data | `{data}` |
| data digest | `{digest}` |
| code of the run | `{commit}` |
| written by | {versions} |

## Proof

This folder was loaded with transformers, in fp32 on the CPU and with the Pillow image processor, and compared with the
trained model. The largest absolute differences are {proof}.

## Configuration

Paths and URLs are left out.

```json
{config}
```
"""

TOP1 = "validation/top1"
MEASURES = {
    TOP1: "top-1 accuracy",
    "probe/knn_top1": "top-1 accuracy of k-NN on the frozen features",
    "probe/linear_top1": "top-1 accuracy of a linear probe of the frozen features",
    "validation/loss": "loss",
}


def model_card(
    manifest: Manifest, config: PretrainConfig, usage: str, proof: Proof, measured: Mapping[str, float]
) -> str:
    """Return the text of the model card: what the model is, how to load it, how good it is, and how it was trained.

    Args:
        manifest: Manifest of the exported checkpoint.
        config: Configuration of the run.
        usage: Code that loads the model.
        proof: Differences between the folder and our model.
        measured: Metrics that the run has logged for the checkpoint's step.
    """
    is_classifier, names = proof.has_classifier, manifest.class_names
    validation = data_names(config.data.validation)
    return CARD.format(
        front_matter=front_matter(
            config.run_dir.name, ["vit"], is_classifier=is_classifier, data=validation, top1=measured.get(TOP1)
        ),
        title=config.run_dir.name,
        usage=usage,
        classes=f"It classifies images into {class_list(names)}" if is_classifier else "It has no classifier.",
        layers=config.model.num_hidden_layers,
        width=config.model.hidden_size,
        patch=config.model.patch_size,
        size=config.model.image_size,
        validation=validation,
        accuracy="\n".join(
            f"| {description} | {f'{measured[name]:.4f}' if name in measured else 'not measured'} |"
            for name, description in MEASURES.items()
            if is_classifier or name != TOP1
        ),
        objective=config.objective.name,
        step=manifest.state.step,
        images_seen=manifest.state.images_seen,
        data=data_names(config.data.train),
        digest=manifest.data_digests["training"],
        commit=manifest.git_commit or "unknown",
        versions=versions(),
        proof=proof,
        config=config_json(config),
    )
