"""The model card of an exported folder; its snippet is run by the tests."""

import json

from pretrain.checkpoint.manifest import Manifest
from pretrain.config import PretrainConfig
from pretrain.export.proof import Proof

CARD = """---
library_name: transformers
pipeline_tag: image-classification
tags: [vision, vit, tessera]
---

# {title}

A Vision Transformer pretrained with Tessera: {layers} layers of width {width}, patches of {patch} pixels, images of
{size} x {size}. It classifies {num_classes} classes.

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{folder}")
print(classify("image.jpg"))
```

As an encoder (`add_pooling_layer=False`, because transformers' ViT would add a pooler that was never trained):

```python
from transformers import AutoModel

encoder = AutoModel.from_pretrained("{folder}", add_pooling_layer=False)
```

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
model by at most {logits:.1e} in the logits, {features:.1e} in the features and {pixels:.1e} in the pixels (absolute).

## Configuration

```json
{config}
```
"""


def model_card(manifest: Manifest, config: PretrainConfig, proof: Proof) -> str:
    """Write the card: what it is, how to load it, how it came about, and the proof."""
    return CARD.format(
        title=config.run_dir.name,
        folder="path/to/this/folder",
        layers=config.model.num_hidden_layers,
        width=config.model.hidden_size,
        patch=config.model.patch_size,
        size=config.model.image_size,
        num_classes=len(manifest.class_names),
        objective=config.objective.name,
        step=manifest.step,
        samples=manifest.samples,
        digest=manifest.data_digest,
        commit=manifest.git_commit,
        logits=proof.logits,
        features=proof.features,
        pixels=proof.pixels,
        config=json.dumps(manifest.config, indent=2),
    )
