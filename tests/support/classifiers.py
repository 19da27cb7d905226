"""Tiny Hugging Face classifiers of several architectures."""

from pathlib import Path

import torch
import transformers

SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}


def tiny_configs() -> dict[str, transformers.PretrainedConfig]:
    """Return the configuration of a tiny classifier of each architecture."""
    return {
        "vit": transformers.ViTConfig(**SMALL, intermediate_size=64),
        "deit": transformers.DeiTConfig(**SMALL, intermediate_size=64),
        "dinov2": transformers.Dinov2Config(**SMALL, mlp_ratio=2),
        "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
        "swin": transformers.SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        "clip": transformers.CLIPConfig(vision_config={**SMALL, "intermediate_size": 64}, text_config=TEXT),
        "siglip": transformers.SiglipConfig(vision_config={**SMALL, "intermediate_size": 64}, text_config=TEXT),
    }


def save_classifier(config: transformers.PretrainedConfig, path: Path) -> Path:
    """Save a classifier with three classes and random weights, and its image processor; return the folder."""
    torch.manual_seed(0)
    config.num_labels = 3
    config.architectures = [config.__class__.__name__.replace("Config", "ForImageClassification")]
    model = transformers.AutoModelForImageClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessorPil(size=size, do_convert_rgb=True).save_pretrained(path)
    return path
