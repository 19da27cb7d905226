"""The model card of an exported folder. The tests run its code."""

import json

from pretrain.checkpoint.manifest import Manifest
from pretrain.config import PretrainConfig
from pretrain.export.proof import Proof

CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [vision, vit, vitrail]
---

# {title}

A Vision Transformer pretrained with Vitrail: {layers} layers of width {width}, for images of {size} x {size} pixels in
patches of {patch} x {patch}.

{usage}

## Training

| | |
|---|---|
| objective | {objective} |
| optimizer steps | {step} |
| images seen | {images_seen} |
| data digest | `{digest}` |
| code | `{commit}` |

## Proof

This folder was loaded with transformers, in fp32 on the CPU and with the Pillow image processor, and compared with the
trained model. The largest absolute differences are {proof}.

## Configuration

```json
{config}
```
"""


def model_card(manifest: Manifest, config: PretrainConfig, usage: str, proof: Proof) -> str:
    """Return the text of the model card: what the model is, how to load it, how it was trained, and the proof.

    Args:
        manifest: Manifest of the exported checkpoint.
        config: Configuration of the run.
        usage: Section about loading the model, with the placeholders {folder} and {num_classes}.
        proof: Differences between the folder and our model.
    """
    return CARD.format(
        title=config.run_dir.name,
        task="image-classification" if proof.has_classifier else "image-feature-extraction",
        usage=usage.format(folder="path/to/this/folder", num_classes=len(manifest.class_names)),
        layers=config.model.num_hidden_layers,
        width=config.model.hidden_size,
        patch=config.model.patch_size,
        size=config.model.image_size,
        objective=config.objective.name,
        step=manifest.state.step,
        images_seen=manifest.state.images_seen,
        digest=manifest.data_digests["training"],
        commit=manifest.git_commit,
        proof=proof,
        config=json.dumps(manifest.config, indent=2),
    )
