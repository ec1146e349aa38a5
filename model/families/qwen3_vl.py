"""The text half of Qwen3-VL: Qwen3 under other names, and with other defaults.

The tower stays on disk and is copied on export. Without images, the three axes of the interleaved mrope have
equal positions, so it is plain rope.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from . import qwen3
from .text_half import text_half

TENSORS = qwen3.TENSORS
PREFIXES = ("model.language_model.",)
NESTED = True
COPIED = ("model.visual.",)

DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 128_000,
    "rope_theta": 500_000.0,
    "eos_token_id": None,
}
_OF_QWEN3 = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Qwen3-VL config.json, of the text half alone or with a `text_config`."""
    return replace(qwen3.read(without_windows(DEFAULTS | text_half(hf))), family="qwen3_vl")


def without_windows(hf: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keys of windows, which transformers does not read for this family."""
    return {key: value for key, value in hf.items() if key not in _OF_QWEN3}
