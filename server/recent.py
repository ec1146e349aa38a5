"""A dictionary of what was used last: older entries, which can be read again elsewhere, are forgotten.

How much memory a value holds, near enough for limits.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Generic, TypeVar

import msgspec

K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")


class Recent(Generic[K, V]):
    """At most `limit` entries."""

    def __init__(self, limit: int):
        self._limit = limit
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K, default: D) -> V | D:
        if key not in self._entries:
            return default
        self._entries.move_to_end(key)
        return self._entries[key]

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def discard(self, key: K) -> None:
        self._entries.pop(key, None)


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
