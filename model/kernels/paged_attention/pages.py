"""The arrays of the paged cache, and how each backend lays them out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array

from ...sharding import LogicalAxes
from ..backends import Backend

_HEADS_BEFORE_POSITIONS = ("layers", "pages", "cached_heads", "positions", "head_dim")
_HEADS_FIRST = ("cached_heads", "layers", "pages", "positions", "head_dim")

LAYOUTS: dict[Backend, tuple[LogicalAxes, LogicalAxes]] = {
    # In keys, positions come last: on a CPU, the product of a query with many keys is several times as fast.
    "cpu": (
        ("layers", "pages", "kv_heads", "head_dim", "positions"),
        ("layers", "pages", "kv_heads", "positions", "head_dim"),
    ),
    "reference": (_HEADS_BEFORE_POSITIONS, _HEADS_BEFORE_POSITIONS),
    "gpu": (_HEADS_BEFORE_POSITIONS, _HEADS_BEFORE_POSITIONS),
    "tpu": (_HEADS_FIRST, _HEADS_FIRST),
}
"""The axes of keys and of values."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """The keys and values of all sequences, in the layout of `backend` (LAYOUTS).

    Without `v`, the value of a position is the first numbers of its key (`config.KeysValues`).

    On a CPU, two-byte floats are stored as integers (`kernels.two_byte_floats`)."""

    k: Any  # an array, or what JAX puts in its place in a tree
    v: Any
    backend: Backend = field(metadata={"static": True})

    @classmethod
    def of(cls, stored: Iterable[Array], backend: Backend) -> Pages:
        """Make pages of keys, and of values if they are stored."""
        k, *v = stored
        return cls(k, v[0] if v else None, backend)

    @property
    def stored(self) -> list[Array]:
        """The keys, and the values if they are stored."""
        return [self.k] if self.v is None else [self.k, self.v]

    def size(self, axis: str) -> int:
        """Return the size of one of the axes in LAYOUTS."""
        return self.k.shape[LAYOUTS[self.backend][0].index(axis)]

    @property
    def page_size(self) -> int:
        return self.size("positions")

    @property
    def num_pages(self) -> int:
        """The pages of one layer, with page 0."""
        return self.size("pages")
