"""The names of our weights in Hugging Face's `vit` and `vit_mae`: one table for export, import and warm starts.

transformers 5 has one set of names for modules in memory and another for tensors in a file; transformers 4 has the
latter for both. Folders on the Hub, and those we export, use the file names.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.config import ModelConfig


class HubName(NamedTuple):
    """The name of one of our modules or tensors in transformers.

    Attributes:
        memory: Name in a model of transformers 5.
        file: Name in model.safetensors.
    """

    memory: str
    file: str


ENCODER_NAMES = {
    "cls_token": HubName("embeddings.cls_token", "embeddings.cls_token"),
    "position_embedding": HubName("embeddings.position_embeddings", "embeddings.position_embeddings"),
    "patch_embedding": HubName("embeddings.patch_embeddings.projection", "embeddings.patch_embeddings.projection"),
    "norm": HubName("layernorm", "layernorm"),
}
DECODER_NAMES = {
    "mask_token": HubName("mask_token", "mask_token"),
    "position_embedding": HubName("decoder_pos_embed", "decoder_pos_embed"),
    "embedding": HubName("decoder_embed", "decoder_embed"),
    "norm": HubName("decoder_norm", "decoder_norm"),
    "prediction": HubName("decoder_pred", "decoder_pred"),
}
BLOCK_NAMES = {
    "norm_before": HubName("layernorm_before", "layernorm_before"),
    "attention.q_proj": HubName("attention.q_proj", "attention.attention.query"),
    "attention.k_proj": HubName("attention.k_proj", "attention.attention.key"),
    "attention.v_proj": HubName("attention.v_proj", "attention.attention.value"),
    "attention.o_proj": HubName("attention.o_proj", "attention.output.dense"),
    "norm_after": HubName("layernorm_after", "layernorm_after"),
    "mlp.fc1": HubName("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": HubName("mlp.fc2", "output.dense"),
}
ENCODER_PREFIX = "vit."  # of an encoder's names in a model that also has a classifier or a decoder
CLASSIFIER = ("classifier.weight", "classifier.bias")  # the same names as ours
# The prefix before the number of a block.
LAYERS = "layers."
ENCODER_LAYERS = HubName("layers.", "encoder.layer.")
DECODER_LAYERS = HubName("decoder_layers.", "decoder_layers.")
# transformers 5.23 saves decoder layers under the first name; transformers 4 and folders on the Hub have the second.
SAVED_DECODER_LAYERS, DECODER_LAYERS_ON_HUB = "decoder.decoder_encoder.layer.", "decoder.decoder_layers."

# Folding LayerScale multiplies each factor into the linear layer before it.
LAYER_SCALES = {".attention_scale.weight": ".attention.o_proj", ".mlp_scale.weight": ".mlp.fc2"}
WITHOUT_COUNTERPART = ("classifier.", "pooler.", "decoder.")  # tensors of a folder that are not the encoder's


def encoder_to_hub(weights: Mapping[str, Tensor], model: ModelConfig, prefix: str = "") -> dict[str, Tensor]:
    """Rename an encoder's weights to those of transformers' ViTModel in memory and convert them to fp32.

    Args:
        weights: State of a `ViT` without LayerScale (see `fold_layer_scale`).
        model: Its architecture.
        prefix: Prefix of the names, such as `ENCODER_PREFIX`.

    Returns:
        Weights by transformers' names.
    """
    renamed = {}
    for name, weight in weights.items():
        if name == "patch_embedding.weight":  # a matrix over the values of a patch; transformers has a convolution
            weight = weight.reshape(-1, model.num_channels, model.patch_size, model.patch_size)  # noqa: PLW2901
        renamed[prefix + _to_memory(name, ENCODER_NAMES, ENCODER_LAYERS)] = weight.to(torch.float32)
    return renamed


def decoder_to_hub(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Rename the weights of an MAE decoder to those of transformers' ViTMAEForPreTraining in memory, as fp32.

    Args:
        weights: State of an `MAEDecoder`.
        model: Architecture of the encoder.

    Returns:
        Weights by transformers' names, with the prefix "decoder.".
    """
    renamed = {}
    for name, weight in weights.items():
        if name.startswith("prediction."):
            weight = weight[pixel_order(model)]  # noqa: PLW2901
        renamed[f"decoder.{_to_memory(name, DECODER_NAMES, DECODER_LAYERS)}"] = weight.to(torch.float32)
    return renamed


def encoder_from_hub(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a folder of model type `vit` or `vit_mae` to those of our `ViT` and convert them to fp32.

    Args:
        weights: Tensors of the folder's safetensors files.

    Returns:
        Weights by our names. Heads, poolers and decoders are left out; unknown tensors keep their names.
    """
    renamed = {}
    for name, weight in weights.items():
        short = name.removeprefix(ENCODER_PREFIX)
        if not short.startswith(WITHOUT_COUNTERPART):
            ours = _from_file(short, ENCODER_NAMES, ENCODER_LAYERS)
            renamed[ours] = (weight.flatten(1) if ours == "patch_embedding.weight" else weight).float()
    return renamed


def hub_encoder_config(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of transformers' ViTConfig and ViTMAEConfig that describe the encoder."""
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.mlp_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "layer_norm_eps": model.layer_norm_eps,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": model.num_channels,
        "qkv_bias": True,
    }


def fold_layer_scale(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply LayerScale's factors, which `vit` does not have, into the linear layers before them."""
    folded = dict(weights)
    for name in weights:
        for scale, layer in LAYER_SCALES.items():
            if name.endswith(scale):
                factor, before = folded.pop(name), name.removesuffix(scale) + layer
                folded[f"{before}.weight"] = weights[f"{before}.weight"] * factor[:, None]
                folded[f"{before}.bias"] = weights[f"{before}.bias"] * factor
    return folded


def pixel_order(model: ModelConfig) -> Tensor:
    """Return indices [P * P * C] that reorder a patch from our order, channel first, to transformers', pixel first."""
    return torch.arange(model.num_channels * model.patch_size**2).reshape(model.num_channels, -1).T.flatten()


def _to_memory(name: str, modules: Mapping[str, HubName], layers: HubName) -> str:
    """Return the name in transformers' memory of one of our tensors."""
    if name.startswith(LAYERS):
        number, _, inner = name.removeprefix(LAYERS).partition(".")
        return f"{layers.memory}{number}.{_to_memory(inner, BLOCK_NAMES, layers)}"
    module = name.removesuffix(".weight").removesuffix(".bias")
    return modules[module].memory + name.removeprefix(module) if module in modules else name


def _from_file(name: str, modules: Mapping[str, HubName], layers: HubName) -> str:
    """Return our name of a tensor in a file."""
    if name.startswith(layers.file):
        number, _, inner = name.removeprefix(layers.file).partition(".")
        return f"{LAYERS}{number}.{_from_file(inner, BLOCK_NAMES, layers)}"
    module = name.removesuffix(".weight").removesuffix(".bias")
    ours = {hub.file: ours for ours, hub in modules.items()}
    return ours[module] + name.removeprefix(module) if module in ours else name


def decoder_name_on_hub(name: str) -> str:
    """Return the name on the Hub of a tensor that transformers has saved; only those of decoder layers differ."""
    return name.replace(SAVED_DECODER_LAYERS, DECODER_LAYERS_ON_HUB)
