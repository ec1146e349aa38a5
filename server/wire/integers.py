"""Long lists of integers in JSON bodies, as arrays: they are checked and handed on as a whole."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import GetPydanticSchema, StrictInt
from pydantic_core import core_schema


def _packed(values: list[int]) -> np.ndarray:
    try:
        return np.asarray(values, np.int64)
    except OverflowError:
        at = next(at for at, value in enumerate(values) if not -(1 << 63) <= value < 1 << 63)
        raise ValueError(f"{str(values[at])[:32]} at position {at} does not fit in 64 bits") from None


def _schema(_type: Any, handler: Any) -> core_schema.CoreSchema:
    return core_schema.no_info_after_validator_function(_packed, handler.generate_schema(list[StrictInt]))


Integers = Annotated[np.ndarray, GetPydanticSchema(_schema)]
"""A list of integers in JSON, an int64 array in Python."""
