"""The table of Hugging Face names covers every weight, in both directions."""

import torch
import transformers

from pretrain.config import MAEConfig, ModelConfig
from pretrain.export.vit_mae import hub_mae_config
from pretrain.model.hub_names import decoder_to_hub, encoder_from_hub, encoder_to_hub
from pretrain.model.mae_decoder import MAEDecoder
from pretrain.model.vit import ViT

MODEL = ModelConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=8, image_size=32)
FILE_NAMES = {"layers.": "encoder.layer.", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"} | {
    f"attention.{ours}": f"attention.{theirs}"
    for ours, theirs in {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }.items()
}


def test_names_in_memory_are_those_of_transformers_masked_autoencoder() -> None:
    objective = MAEConfig()
    encoder = encoder_to_hub(ViT(MODEL).state_dict(), MODEL)
    decoder = decoder_to_hub(MAEDecoder(objective.decoder_config(MODEL), MODEL.hidden_size).state_dict(), MODEL)
    with torch.device("meta"):
        theirs = transformers.ViTMAEForPreTraining(hub_mae_config(MODEL, objective)).state_dict()
    ours = {f"vit.{name}": weight for name, weight in encoder.items()} | decoder
    assert {name: weight.shape for name, weight in ours.items()} == {
        name: weight.shape for name, weight in theirs.items()
    }


def test_names_in_files_are_read_back_as_ours() -> None:
    ours = ViT(MODEL).state_dict()
    in_file = {}
    for name, weight in encoder_to_hub(ours, MODEL).items():
        for memory, file in FILE_NAMES.items():
            name = name.replace(memory, file)  # noqa: PLW2901
        in_file[f"vit.{name}"] = weight
    others = {name: torch.zeros(1) for name in ("classifier.weight", "vit.pooler.dense.bias", "decoder.mask_token")}
    read = encoder_from_hub(in_file | others)
    assert read.keys() == ours.keys()
    assert all(torch.equal(weight, ours[name]) for name, weight in read.items())


def test_unknown_tensors_keep_their_names() -> None:
    assert encoder_from_hub({"vit.registers": torch.zeros(1)}).keys() == {"registers"}
