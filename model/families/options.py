"""Readers for single values of a config.json. Each error names the key and the value found."""

from __future__ import annotations

from typing import Any

from ..config import UnsupportedModelError


def whole(hf: dict[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """Read a whole number of at least `least`; `default` if the key is absent."""
    value = hf.get(key, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        found = f"is {value!r}" if key in hf else "is missing"
        raise UnsupportedModelError(f"{key} {found}; it must be a whole number of at least {least}")
    return value


def number(hf: dict[str, Any], key: str, default: float | None = None) -> float:
    """Read a number above zero; `default` if the key is absent."""
    value = hf.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        found = f"is {value!r}" if key in hf else "is missing"
        raise UnsupportedModelError(f"{key} {found}; it must be a number above zero")
    return float(value)


def flag(hf: dict[str, Any], key: str, default: bool = False) -> bool:
    """Read true or false; `default` if the key is absent."""
    value = hf.get(key, default)
    if not isinstance(value, bool):
        raise UnsupportedModelError(f"{key} is {value!r}; it must be true or false")
    return value


def tokens(hf: dict[str, Any], key: str, default: int | None = None) -> tuple[int, ...]:
    """Read one token id, a list of them, or none."""
    value = hf.get(key, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
        raise UnsupportedModelError(f"{key} is {value!r}; it must be a token id or a list of token ids")
    return tuple(ids)
