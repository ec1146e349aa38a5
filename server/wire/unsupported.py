"""Fields of other servers' requests that this one does not have.

Clients send them with values that ask for nothing: null, an empty list, the default. Those are accepted; any
other value is refused with an error that names the field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import ConfigDict, model_validator

from .body import Body

AsksForNothing = Callable[[Any], bool]
Unsupported = dict[str, AsksForNothing]


def only(*values: Any) -> AsksForNothing:
    """Accept these values; True and 1 are different ones."""
    return lambda value: any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in values
    )


def anything(_value: Any) -> bool:
    """Accept every value: it changes no answer."""
    return True


def empty(value: Any) -> bool:
    """Accept an empty text, list or object."""
    return value in ("", [], {})


def one_or_list(value: Any) -> str:
    """Tell the two types apart, so that errors are about the one that was sent. The names are no fields."""
    return LIST if isinstance(value, (list, tuple)) else ONE


ONE, LIST = "<one>", "<list>"


def no_biases(value: Any) -> bool:
    """Accept an object of numbers that are all zero."""
    return empty(value) or (isinstance(value, dict) and not any(value.values()))


def empty_or(*values: Any) -> AsksForNothing:
    """Accept what is empty, and these values."""
    return lambda value: empty(value) or only(*values)(value)


class StrictBody(Body):
    """A body in which null means the same as a field left out, and whose unknown fields are refused.

    `UNSUPPORTED` has the fields that are known and not supported, with the values that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid")
    UNSUPPORTED: ClassVar[Unsupported] = {}
    NULLABLE: ClassVar[frozenset[str]] = frozenset()
    """Fields in which null has a meaning of its own."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if not cls._asks_for_nothing(name, value)}

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        known = cls.UNSUPPORTED.get(name)
        if value is None:
            return name not in cls.NULLABLE
        return known is not None and known(value)
