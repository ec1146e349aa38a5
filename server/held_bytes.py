"""How much memory a value holds, near enough for limits."""

from __future__ import annotations

from typing import Any

import msgspec

_OBJECT = 64  # of its header, and of its place where it is referred to


def held_bytes(value: Any) -> int:
    """Of text, bytes, numbers, lists, dictionaries and messages, with all that is in them."""
    if isinstance(value, (bytes, bytearray, str)):
        return _OBJECT + len(value)
    if isinstance(value, dict):
        return _OBJECT + sum(held_bytes(key) + held_bytes(each) for key, each in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return _OBJECT + sum(map(held_bytes, value))
    if isinstance(value, msgspec.Struct):
        return _OBJECT + sum(held_bytes(getattr(value, name)) for name in value.__struct_fields__)
    return _OBJECT
