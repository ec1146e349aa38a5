"""The text half of Kimi-K2.5 and K2.6: Kimi-K2 under other names. The tower stays on disk and is copied on
export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from . import deepseek_v3
from .text_half import text_half

TENSORS, QUANTIZED = deepseek_v3.TENSORS, deepseek_v3.QUANTIZED
PREFIXES = ("language_model.model.", "model.language_model.")
NESTED = True
COPIED = ("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector.")


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert the config.json of a Kimi-K2.5."""
    return replace(deepseek_v3.read(text_half(hf)), family="kimi_k25")
