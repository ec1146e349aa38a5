"""The text half of the Nemotron 3 that see and hear: a Nemotron-H under other names. The towers stay on disk
and are copied on export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from . import nemotron_h
from .text_half import text_half

TENSORS, UNTRANSPOSED = nemotron_h.TENSORS, nemotron_h.UNTRANSPOSED
PREFIXES = ("language_model.backbone.", "language_model.model.", "model.language_model.")
COPIED = (
    *("vision_model.", "vision_projection.", "mlp1.", "sound_encoder.", "sound_projection."),
    *("vision_final_layernorm.", "multi_modal_projector.", "audio_tower.", "embed_audio."),
    *("language_model.mtp.", "mtp."),
)


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert the config.json of a Nemotron 3 with towers."""
    if "text_config" not in hf and "llm_config" in hf:  # its name in earlier files
        hf = hf | {"text_config": hf["llm_config"]}
    return replace(nemotron_h.read(text_half(hf)), family="nemotron_h_omni")
