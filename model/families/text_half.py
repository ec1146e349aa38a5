"""The text half of a model that sees: its config is nested in `text_config`, beside those of the towers."""

from __future__ import annotations

from typing import Any

from ..config import UnsupportedModelError


def text_half(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the text half, which is `hf` itself if nothing is nested.

    The top level decides the model type and whether embeddings are tied, and its end-of-sequence tokens
    replace those of the text half. Raises UnsupportedModelError if `text_config` is not an object."""
    text = hf.get("text_config")
    if text is None:
        return hf
    if not isinstance(text, dict):
        raise UnsupportedModelError(f"text_config is {text!r}; it must be an object")
    above = {key: hf[key] for key in ("eos_token_id",) if hf.get(key) is not None}
    return (
        text
        | above
        | {"model_type": hf["model_type"], "tie_word_embeddings": hf.get("tie_word_embeddings", False)}
    )
