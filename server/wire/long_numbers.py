"""Finds the field of a JSON body whose number has more digits than a parser reads."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class LongNumber:
    """`location`: the keys and indices that lead to it, the outermost first. `content`: the whole body, with
    a text in the number's place."""

    location: Location
    digits: int
    content: Any

    @property
    def message(self) -> str:
        return f"a number of {self.digits} digits is too long to be read"


def over_python_limit(digits: str) -> bool:
    """Whether `json.loads` raises ValueError for this number: an integer of more than 4300 digits."""
    digits = digits.lstrip("-")
    return digits.isdigit() and 0 < sys.get_int_max_str_digits() < len(digits)


def over_float64(digits: str) -> bool:
    """Whether `orjson.loads` takes this number for infinity, which it refuses."""
    return math.isinf(float(digits))


def find(raw: bytes, is_too_long: Callable[[str], bool]) -> LongNumber | None:
    """Return the first number of a body for which `is_too_long`; None also for what is no JSON."""

    def number(digits: str) -> Any:
        if is_too_long(digits):
            return _TooLong(digits)
        return int(digits) if digits.lstrip("-").isdigit() else float(digits)

    try:
        content = json.loads(raw, parse_int=number, parse_float=number)
    except (ValueError, RecursionError):
        return None
    for location, value in _scalars(content):
        if isinstance(value, _TooLong):
            return LongNumber(location, sum(map(str.isdigit, value)), content)
    return None


class _TooLong(str):
    """The digits, in the number's place."""


def _scalars(content: Any) -> Iterator[tuple[Location, Any]]:
    """The values that are neither objects nor lists, in the order in which they stand."""
    waiting: list[tuple[Location, Any]] = [((), content)]
    while waiting:
        location, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [((*location, key), inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list):
            waiting += [((*location, index), inner) for index, inner in reversed([*enumerate(value)])]
        else:
            yield location, value
