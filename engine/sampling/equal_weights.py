"""Comparison of sampler weights, so that sets that are equal to the bit share one copy."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class Source:
    """The arrays that a copy was made from, without keeping them alive. A training step makes new ones."""

    def __init__(self, arrays: PyTree):
        self._leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(arrays)]

    def is_still(self, arrays: PyTree) -> bool:
        """Return whether these are the same array objects, and hence the same weights."""
        leaves = jax.tree.leaves(arrays)
        return len(leaves) == len(self._leaves) and all(
            known() is leaf for known, leaf in zip(self._leaves, leaves, strict=True)
        )


def likeness(arrays: PyTree, scale: float) -> Hashable:
    """Return a key that equal weights share and others rarely do.

    It consists of their shapes, their scale and the digest of their smallest array, the only one that is
    read.
    """
    leaves, structure = jax.tree.flatten(arrays)
    smallest = np.asarray(min(leaves, key=lambda leaf: leaf.nbytes))
    digest = hashlib.blake2b(smallest.tobytes(), digest_size=16).digest()
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves), scale, digest


def are_equal(one: PyTree, other: PyTree) -> bool:
    """Return whether arrays of equal structure, shapes and dtypes have the same bits."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a is b or bool(_have_same_bits(a, b)) for a, b in pairs)


@jax.jit
def _have_same_bits(one: jax.Array, other: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * one.dtype.itemsize}")
    return jnp.array_equal(one.view(unsigned), other.view(unsigned))
