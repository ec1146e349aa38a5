"""Parking: arrays that leave the device for a while and come back bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


class Parked:
    """The arrays of a tree in the host's memory. The ones on the device stay until `free`."""

    def __init__(self, tree: Any):
        leaves, self._structure = jax.tree.flatten(tree)
        self._device: list[jax.Array] | None = leaves
        self._shardings = [leaf.sharding for leaf in leaves]
        # A copy, because on a CPU a view would refer to the memory that will be freed.
        self._host = [np.array(jax.device_get(leaf), copy=True) for leaf in leaves]

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._host)

    def free(self) -> None:
        """Free the device's memory, even if something still refers to it."""
        for leaf in self._device or ():
            if not leaf.is_deleted():
                leaf.delete()
        self._device = None

    def on_device(self) -> Any:
        """Return the tree with new arrays, in the places of the old ones."""
        placed = [jax.device_put(*pair) for pair in zip(self._host, self._shardings, strict=True)]
        # `device_put` may keep using the host's memory, which is freed with this object.
        return jax.block_until_ready(jax.tree.unflatten(self._structure, placed))
