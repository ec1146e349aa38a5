"""The shape of a decoder, as `folder` reads it from a Hugging Face folder. Imports no array library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class UnsupportedModelError(ValueError):
    """The folder does not hold a supported model; the message says why."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for contexts longer than those of pre-training.

    `llama3`: low frequencies are divided by `factor`, high ones are unchanged, with a linear blend in between
    (Llama 3.1's rule). `linear`: all frequencies are divided by `factor`. `yarn` (arXiv:2309.00071):
    frequencies that turn fewer than `beta_slow` times in the original context are divided by `factor`, those
    that turn more than `beta_fast` times are unchanged, with a linear blend in between. Cosine and sine are
    multiplied by `attention_factor`. With `truncate`, the blend begins and ends at whole dimensions.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines a decoder's parameters and arithmetic.

    Hashable, for use as a static jit argument."""

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
    biased: tuple[str, ...] = ()
    """The linears with biases: q, k and v in Qwen2, or those that config.json names."""
    qk_norm: bool = False
    """Whether each head of q and k goes through an RMSNorm before rope (Qwen3)."""
    sliding_window: int | None = None
    """The most keys that a query sees in windowed layers, including its own."""
    windowed_layers: tuple[bool, ...] | None = None
    """Whether each layer has the window, one entry per layer. None means all layers."""
    eos_token_ids: tuple[int, ...] = ()

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each of the seven matrices of a layer."""
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


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file; None if the file does not exist.

    Raises UnsupportedModelError for a damaged file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path} does not hold a JSON object")
    return content
