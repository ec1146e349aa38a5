"""The shape of a decoder, read from a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class UnsupportedModelError(ValueError):
    """The folder is not a model that we can run; the message says what is wrong with it."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pre-training's.

    `llama3`: low frequencies divided by `factor`, high ones kept, a linear blend between
    (Llama 3.1's rule). `linear`: all divided by `factor`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a decoder's parameters and arithmetic. Hashable: a static jit argument."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_sequence_length: int
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    """q, k and v have biases (Qwen2)."""
    qk_norm: bool = False
    """Each head of q and k goes through an RMSNorm before rope (Qwen3)."""
    sliding_window: int | None = None
    """Every query sees at most this many keys, itself included."""
    eos_token_ids: tuple[int, ...] = ()

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each of a layer's seven matrices."""
        D, F, H = self.hidden_size, self.intermediate_size, self.head_dim
        return {
            "q_proj": (D, self.num_heads * H),
            "k_proj": (D, self.num_kv_heads * H),
            "v_proj": (D, self.num_kv_heads * H),
            "o_proj": (self.num_heads * H, D),
            "gate_proj": (D, F),
            "up_proj": (D, F),
            "down_proj": (F, D),
        }


def read_config(folder: Path) -> ModelConfig:
    """Read config.json, and generation_config.json's end-of-sequence tokens where there are any.

    Raises UnsupportedModelError for a missing file, an unknown family or an option we do not compute.
    """
    from .families import FAMILIES

    hf = _read_json(Path(folder) / "config.json")
    if hf is None:
        raise UnsupportedModelError(f"{folder} has no config.json: not a Hugging Face model folder")
    family = FAMILIES.get(hf.get("model_type", ""))
    if family is None:
        raise UnsupportedModelError(
            f"{folder}: model_type {hf.get('model_type')!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    generation = _read_json(Path(folder) / "generation_config.json") or {}
    if generation.get("eos_token_id") is not None:
        hf = hf | {"eos_token_id": generation["eos_token_id"]}
    return family.read(hf)


def _read_json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None
