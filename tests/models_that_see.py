"""Tiny random models that see, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file
from tiny_models import hf_config

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_TOWER = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
QWEN_TOWER |= {"num_position_embeddings": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
ROPE = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
LEFT_OUT = ("model_type", "architectures", "rope_theta", "rope_scaling", "torch_dtype")


def text(variant, **changes):
    return {key: value for key, value in hf_config(variant).items() if key not in LEFT_OUT} | changes


WHOLES = {
    "gemma3": {
        "text_config": text("gemma3_text"),
        "vision_config": TOWER | {"image_size": 28, "patch_size": 14},
        "tie_word_embeddings": True,
    },
    "kimi_k25": {
        "text_config": text("deepseek_v3", rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "vision_config": TOWER,
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {
        "text_config": text("qwen3", rope_parameters=ROPE),
        "vision_config": QWEN_TOWER,
        "tie_word_embeddings": False,
    },
    "qwen3_vl_moe": {
        "text_config": text("qwen3_moe", rope_parameters=ROPE),
        "vision_config": QWEN_TOWER,
        "tie_word_embeddings": False,
    },
}

WITH_MAMBA = {
    "nemotron_h_omni": {
        "text_config": text("nemotron_h"),
        "vision_config": TOWER
        | {"model_type": "radio", "image_size": 8, "max_img_size": 16, "patch_size": 4}
        | {"video_temporal_patch_size": 2},
        "vision_hidden_size": 16,
        "projector_hidden_size": 24,
        "tie_word_embeddings": False,
    },
}
"""PEFT refuses adapters of a Mamba-2's out_proj."""


def write_model_that_sees(folder: Path, model_type: str) -> Any:
    """Write a model of `WHOLES` or `WITH_MAMBA` into `folder`, without a tokenizer, and return it."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(WHOLES | WITH_MAMBA)[model_type])
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms are not all alike, and experts not all zero
            parameter.copy_(parameter + 0.15 * torch.randn(parameter.shape) / (2 if "norm" in name else 1))
    model.save_pretrained(folder)
    if model_type == "kimi_k25":
        # transformers takes the layers of the text half for those of the tower when it names them
        tensors = load_file(folder / "model.safetensors")
        of_text = "language_model.model.blocks.", "language_model.model.layers."
        renamed = {name.replace(*of_text): array for name, array in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return model
