"""The matrices of some groups among those of others."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Stacked(NamedTuple):
    """The matrices of the groups among others: those from number `first` on.

    A backend that picks a matrix at a time reads them in place, where slicing would copy all of them."""

    matrices: Float[Array, "M I O"]
    first: Int[Array, ""]
