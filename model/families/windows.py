"""Reads the sliding windows of Qwen2 and Qwen3 from config.json."""

from __future__ import annotations

from typing import Any

from ..config import UnsupportedModelError
from .options import flag, whole

_LEGACY = {"attention": "full_attention"}
FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(hf: dict[str, Any]) -> tuple[int | None, ...]:
    """Return each layer's sliding window, or nothing if no layer has one.

    As in transformers, `layer_types` decides if it is given. Otherwise layers from `max_window_layers` (28)
    on have the window if `use_sliding_window` is true. A window as long as the longest sequence counts as
    none.
    """
    num_layers = whole(hf, "num_hidden_layers", 32)
    size = hf.get("sliding_window", 4096) if flag(hf, "use_sliding_window") else None
    if hf.get("layer_types") is not None:
        windowed = _of_layer_types(hf["layer_types"], num_layers, size)
    elif size is not None:
        first = whole(hf, "max_window_layers", 28, least=-(2**31))
        windowed = tuple(layer >= first for layer in range(num_layers))
    else:
        windowed = ()
    if not any(windowed):
        return ()
    size = whole({"sliding_window": size}, "sliding_window")
    if size >= whole(hf, "max_position_embeddings", 32_768):
        return ()
    return tuple(size if each else None for each in windowed)


def window_of_all_layers(hf: dict[str, Any], if_absent: int | None) -> tuple[int | None, ...]:
    """Return each layer's window for families in which all layers have `sliding_window`, unless it is null.

    A window as long as the longest sequence counts as none."""
    if hf.get("sliding_window", if_absent) is None:
        return ()
    size = whole(hf, "sliding_window", if_absent)
    if size >= whole(hf, "max_position_embeddings", 131_072):
        return ()
    return (size,) * whole(hf, "num_hidden_layers", 32)


def windows_of_layer_types(stated: Any, num_layers: int, size: Any) -> tuple[int | None, ...]:
    """Return each layer's window, of `size`, where `layer_types` decides."""
    windowed = _of_layer_types(stated, num_layers, size)
    size = whole({"sliding_window": size}, "sliding_window") if any(windowed) else None
    return tuple(size if each else None for each in windowed)


def _of_layer_types(stated: Any, num_layers: int, size: Any) -> tuple[bool, ...]:
    if not isinstance(stated, list) or len(stated) != num_layers:
        count = f"{len(stated)} entries" if isinstance(stated, list) else repr(stated)
        raise UnsupportedModelError(f"layer_types has {count}; it must list all {num_layers} layers")
    types = [_LEGACY.get(each, each) if isinstance(each, str) else each for each in stated]
    for each in types:
        if each not in (FULL, SLIDING):
            raise UnsupportedModelError(f"layer_types: {each!r} is not supported; known: {FULL}, {SLIDING}")
    if SLIDING in types and size is None:
        raise UnsupportedModelError(
            f"layer_types has {SLIDING}, but there is no window: use_sliding_window is false, or "
            "sliding_window is null"
        )
    return tuple(each == SLIDING for each in types)
