"""Reads the rotary embedding's settings from every place in config.json that transformers reads.

Reference: transformers 5, `modeling_rope_utils`. `rope_scaling`, if present, overrides `rope_parameters`.
"""

from __future__ import annotations

import math
from typing import Any

from ..config import RopeScaling, UnsupportedModelError
from .options import flag, number, whole


def read_rope(hf: dict[str, Any], max_position: int) -> tuple[float, RopeScaling | None]:
    """Return the base of the frequencies and their scaling."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    if not isinstance(rope, dict):
        raise UnsupportedModelError(f"{key} is {rope!r}; it must be an object")
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModelError(f"{key} has an entry per layer type ({', '.join(nested)}), not supported")
    for stated in (hf, hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}):
        partial = stated.get("partial_rotary_factor")
        if partial is not None and partial != 1:
            raise UnsupportedModelError(
                f"partial_rotary_factor {partial!r} is not supported: all of a head's dimensions are rotated"
            )
    theta = number(rope, "rope_theta") if "rope_theta" in rope else number(hf, "rope_theta", 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    try:
        return theta, _scaling(kind, rope, hf, max_position)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{key}: {error}") from None


def _scaling(kind: Any, rope: dict[str, Any], hf: dict[str, Any], max_position: int) -> RopeScaling | None:
    if kind in ("default", "dynamic"):
        return None  # dynamic scaling begins beyond max_position_embeddings, which no sequence here exceeds
    if kind == "linear":
        return RopeScaling("linear", number(rope, "factor"))
    stated = hf if "original_max_position_embeddings" in hf else rope
    original = whole(stated, "original_max_position_embeddings", max_position)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=number(rope, "factor"),
            low_freq_factor=number(rope, "low_freq_factor"),
            high_freq_factor=number(rope, "high_freq_factor"),
            original_max_position=original,
        )
    if kind == "longrope":
        return _longrope(rope, original, max_position)
    if kind == "yarn":
        factor = max_position / original if rope.get("factor", 0) is None else number(rope, "factor")
        return RopeScaling(
            "yarn",
            factor=factor,
            original_max_position=original,
            beta_fast=number(rope, "beta_fast") if rope.get("beta_fast") else 32.0,
            beta_slow=number(rope, "beta_slow") if rope.get("beta_slow") else 1.0,
            attention_factor=_yarn_attention_factor(rope, factor),
            truncate=flag(rope, "truncate", True),
        )
    raise UnsupportedModelError(
        f"rope_type {kind!r} is not supported; known: default, linear, dynamic, llama3, yarn, longrope"
    )


def _longrope(rope: dict[str, Any], original: int, max_position: int) -> RopeScaling:
    """Read the factors of sequences up to the original context.

    Longer sequences have other factors, from their first token on, so none are allowed
    (`longest_sequence`)."""
    factors = rope.get("short_factor")
    if not isinstance(factors, list) or not all(
        isinstance(each, int | float) and not isinstance(each, bool) and each > 0 for each in factors
    ):
        raise UnsupportedModelError(f"short_factor is {factors!r}; it must be a list of numbers above zero")
    factor = max_position / original if rope.get("factor") is None else number(rope, "factor")
    if rope.get("attention_factor") is not None:
        attention_factor = number(rope, "attention_factor")
    else:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        factor=factor,
        original_max_position=original,
        attention_factor=attention_factor,
        factors=tuple(map(float, factors)),
    )


def longest_sequence(max_position: int, scaling: RopeScaling | None) -> int:
    """Return the longest sequence whose positions we compute as transformers does."""
    if scaling is None or scaling.kind != "longrope":
        return max_position
    return min(max_position, scaling.original_max_position)


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")

    def scale(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(number(rope, "mscale")) / scale(number(rope, "mscale_all_dim"))
    return scale()
