"""The model card of an exported folder; its snippet is run by the tests."""

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

A Vision Transformer pretrained with Vitrail: {layers} layers of width {width}, patches of {patch} pixels, images of
{size} x {size}.

{usage}

## Training

| | |
|---|---|
| objective | {objective} |
| optimizer steps | {step} |
| images seen | {samples} |
| data digest | `{digest}` |
| code | `{commit}` |

## Proof

Loaded back with transformers, in fp32 on the CPU, with the Pillow image processor, the folder differs from the trained
model by at most {proof} (absolute).

## Configuration

```json
{config}
```
"""


def model_card(manifest: Manifest, config: PretrainConfig, usage: str, proof: Proof) -> str:
    """Write the card: what it is, how to load it, how it came about, and the proof."""
    return CARD.format(
        title=config.run_dir.name,
        task="image-classification" if "logits" in proof.differences else "image-feature-extraction",
        usage=usage.format(folder="path/to/this/folder", num_classes=len(manifest.class_names)),
        layers=config.model.num_hidden_layers,
        width=config.model.hidden_size,
        patch=config.model.patch_size,
        size=config.model.image_size,
        objective=config.objective.name,
        step=manifest.step,
        samples=manifest.samples,
        digest=manifest.data_digests["training"],
        commit=manifest.git_commit,
        proof=proof,
        config=json.dumps(manifest.config, indent=2),
    )
