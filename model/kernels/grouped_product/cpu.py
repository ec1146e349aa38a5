"""Blocks of rows of one group, one after the other.

XLA's CPU backend multiplies every row with every group's matrix in `ragged_dot`. Here each group's rows are
cut into blocks of a fixed number of rows, and a loop multiplies block after block with the group's matrix.
The loop has as many turns as there are blocks, so an empty group costs nothing. A group's last block reaches
over its end: products write blocks in order, so that the next group's block replaces these rows, and
`outer` sets them to zero.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .stacked import Stacked

_SMALLEST, _LARGEST = 8, 128  # rows of a block


def product(x_SI: Float[Array, "S I"], w: Stacked, sizes_G: Int[Array, " G"]) -> Float[Array, "S O"]:
    return _product(x_SI, w, sizes_G, transposed=False)


def product_transposed(
    dy_SO: Float[Array, "S O"], w: Stacked, sizes_G: Int[Array, " G"]
) -> Float[Array, "S I"]:
    """Multiply with the transposes, block by block: XLA would transpose the matrices of all groups first."""
    return _product(dy_SO, w, sizes_G, transposed=True)


def _product(x_SI: Array, w: Stacked, sizes_G: Array, transposed: bool) -> Array:
    S, O = len(x_SI), w.matrices.shape[1 if transposed else 2]  # noqa: E741  the letters of the shapes
    blocks = _Blocks.of(S, sizes_G)
    M = blocks.rows
    padded = jnp.pad(x_SI, ((0, M), (0, 0)))

    def multiply(block: Array, y: Array) -> Array:
        group, first = blocks.place(block)
        rows = jax.lax.dynamic_slice_in_dim(padded, first, M)
        of_group = jax.lax.dynamic_index_in_dim(w.matrices, w.first + group, keepdims=False)
        own = rows @ (of_group.T if transposed else of_group)
        return jax.lax.dynamic_update_slice_in_dim(y, own, first, 0)

    y = jnp.zeros((S + M, O), x_SI.dtype)
    return jax.lax.fori_loop(0, blocks.count, multiply, y)[:S]


def outer(
    x_SI: Float[Array, "S I"], dy_SO: Float[Array, "S O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "G I O"]:
    G, I, O = len(sizes_G), x_SI.shape[1], dy_SO.shape[1]  # noqa: E741  the letters of the shapes
    blocks = _Blocks.of(len(x_SI), sizes_G)
    M = blocks.rows
    x_SI, dy_SO = (jnp.pad(of, ((0, M), (0, 0))) for of in (x_SI, dy_SO))

    def add(block: Array, dw: Array) -> Array:
        group, first = blocks.place(block)
        x, dy = (jax.lax.dynamic_slice_in_dim(of, first, M) for of in (x_SI, dy_SO))
        own = (first + jnp.arange(M) < blocks.end_G[group])[:, None]
        more = jnp.einsum("mi,mo->io", jnp.where(own, x, 0), dy, preferred_element_type=jnp.float32)
        return dw.at[group].add(more)

    return jax.lax.fori_loop(0, blocks.count, add, jnp.zeros((G, I, O), jnp.float32))


class _Blocks(NamedTuple):
    """The blocks of all groups, in order: the number of rows of a block, the end of each group's rows, the
    number of blocks up to the end of each group, and that of all blocks."""

    rows: int
    sizes_G: Int[Array, " G"]
    end_G: Int[Array, " G"]
    blocks_G: Int[Array, " G"]
    count: Int[Array, ""]

    @staticmethod
    def of(rows: int, sizes_G: Int[Array, " G"]) -> _Blocks:
        average = -(-rows // len(sizes_G))
        size = min(max(1 << (average - 1).bit_length(), _SMALLEST), _LARGEST)
        blocks_G = jnp.cumsum(-(-sizes_G // size))
        return _Blocks(size, sizes_G, jnp.cumsum(sizes_G), blocks_G, blocks_G[-1])

    def place(self, block: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Return a block's group, and its first row."""
        group = jnp.searchsorted(self.blocks_G, block, side="right")
        own = -(-self.sizes_G[group] // self.rows)
        first = self.end_G[group] - self.sizes_G[group]
        return group, first + (block - self.blocks_G[group] + own) * self.rows
