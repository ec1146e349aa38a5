"""Grouped products on NVIDIA GPUs.

On Hopper (H100, H200, GH200), with 16-bit floats, they are tokamax's Mosaic kernels: XLA's compiler for GPUs
turns `ragged_dot` into products of every row with every group's matrix. Everything else uses it nevertheless:
other GPUs, float32, and JAX before 0.11.1, for which there is no tokamax.

The kernels are called below tokamax's public operation, which asks the default device what it is
(`attention.gpu`). They take sides that are multiples of 64; others, such as ranks, are padded with zeros.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..attention.gpu import kind_is_hopper
from ..backends import device_kind
from . import ragged

_MULTIPLE = 64


class _Mosaic(NamedTuple):
    product: Any
    outer: Any
    config: Any


@cache
def _mosaic() -> _Mosaic | None:
    """Return tokamax's kernels, or None if tokamax is not installed."""
    try:
        from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu_common as common
        from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu_kernel_sm90 as kernels
    except ImportError:
        return None
    config = common.Config(block_m=64, block_n=64, block_k=64, num_stages=2, split_k=1, persistent=False)
    return _Mosaic(kernels.ragged_dot_kernel, kernels.ragged_contracting_dim_dot_kernel, config)


def _kernels(*arrays: Array) -> _Mosaic | None:
    """Return the kernels if the current mesh's devices and these arrays have any."""
    narrow = all(x.dtype.itemsize == 2 for x in arrays)
    return _mosaic() if narrow and kind_is_hopper(device_kind() or "") else None


def product(
    x_SI: Float[Array, "S I"], w_GIO: Float[Array, "G I O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "S O"]:
    mosaic = _kernels(x_SI, w_GIO)
    if mosaic is None:
        return ragged.product(x_SI, w_GIO, sizes_G)
    y_SO = mosaic.product(_padded(x_SI, 1), _padded(w_GIO, 1, 2), sizes_G, x_SI.dtype, mosaic.config)
    return y_SO[:, : w_GIO.shape[2]]


def product_transposed(
    dy_SO: Float[Array, "S O"], w_GIO: Float[Array, "G I O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "S I"]:
    return product(dy_SO, w_GIO.swapaxes(1, 2), sizes_G)


def outer(
    x_SI: Float[Array, "S I"], dy_SO: Float[Array, "S O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "G I O"]:
    mosaic = _kernels(x_SI, dy_SO)
    if mosaic is None:
        return ragged.outer(x_SI, dy_SO, sizes_G)
    dw_GIO = mosaic.outer(_padded(x_SI, 1), _padded(dy_SO, 1), sizes_G, jnp.dtype(jnp.float32), mosaic.config)
    return dw_GIO[:, : x_SI.shape[1], : dy_SO.shape[1]]


def _padded(x: Array, *axes: int) -> Array:
    """Pad axes with zeros to multiples of 64."""
    return jnp.pad(x, [(0, -size % _MULTIPLE if axis in axes else 0) for axis, size in enumerate(x.shape)])
