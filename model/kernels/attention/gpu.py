"""Attention on NVIDIA GPUs.

On Hopper (H100, H200, GH200), with 16-bit floats, it is tokamax's Mosaic kernel, whose mask is exactly ours:
the first visible key of each query, and the diagonal. Key blocks before the smallest start of a block of
queries are skipped in the forward. Everything else (`why_not`) runs the reference: other GPUs, float32, and
JAX before 0.11.1, for which there is no tokamax.

The kernels are called below tokamax's public operation, which asks the default device what it is: a program
that is compiled for a GPU elsewhere would be refused.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..backends import device_kind

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_SHARED_MEMORY = 227 * 1024


class _Mosaic(NamedTuple):
    forward: Any
    backward: Any
    forward_config: Any
    backward_config: Any


@cache
def _mosaic() -> _Mosaic | None:
    """Return tokamax's kernels, or None if tokamax is not installed."""
    try:
        from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as forward
        from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as backward
    except ImportError:
        return None
    return _Mosaic(
        forward.flash_attention_kernel, backward.flash_attention_vjp_kernel, forward.Config, backward.Config
    )


def why_not(dtype: Any) -> str | None:
    """Return why programs for the current mesh do not use the Mosaic kernel with inputs of this dtype.

    None: they do."""
    kind = device_kind() or ""
    if not kind_is_hopper(kind):
        return f"the flash kernel is for the Hopper generation ({', '.join(_HOPPER)}), and this is {kind}"
    if jnp.dtype(dtype).itemsize != 2:
        return f"the flash kernel takes 16-bit floats, and these are {jnp.dtype(dtype).name}"
    if _mosaic() is None:
        return "tokamax is not installed: install the extra tinsmith[flash], with Python 3.12 or newer"
    return None


def kind_is_hopper(kind: str) -> bool:
    """Return whether a device kind, e.g. "NVIDIA H200", is of the Hopper generation."""
    return any(name in kind.split() for name in _HOPPER)


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Return the output and the log-sum-exp of each query's scores. T is a multiple of 128."""
    mosaic = _mosaic()
    assert mosaic is not None
    wide = q_BTNH.shape[-1] > 128
    config = mosaic.forward_config(block_q=64, block_kv=64 if wide else 128, num_stages=2)

    def row(q: Array, k: Array, v: Array, start_T: Array) -> tuple[Array, tuple[Array, Array]]:
        return mosaic.forward(
            q,
            k,
            v,
            None,
            None,
            start_T[None],
            None,
            is_causal=True,
            logits_soft_cap=None,
            logits_scale=scale,
            out_dtype=q.dtype,
            normalize_output=True,
            return_residuals=True,
            use_stable_softmax=True,
            rescale_threshold=1.0,
            config=config,
        )

    out_BTNH, (top_BNT, total_BNT) = jax.vmap(row)(q_BTNH, k_BTKH, v_BTKH, start_BT)
    return out_BTNH, top_BNT + jnp.log(total_BNT)


def backward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
    out_BTNH: Float[Array, "B T N H"],
    lse_BNT: Float[Array, "B N T"],
    d_out_BTNH: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Return the gradients of q, k and v. T is a multiple of 128."""
    mosaic = _mosaic()
    assert mosaic is not None
    config = mosaic.backward_config(
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
        num_stages=1 if q_BTNH.shape[-1] > 128 else 2,
    )

    # Otherwise XLA lays the saved outputs of all layers out anew, for the sum over `out * d_out` alone.
    out_BTNH = jax.lax.optimization_barrier(out_BTNH)

    def row(q, k, v, start_T, out, lse_NT, d_out) -> tuple[Array, Array, Array]:
        # The kernel's residuals are the largest score m and l = Σ exp(score - m). (lse, 1) means the same.
        residuals = (lse_NT, jnp.ones_like(lse_NT))
        dq, dk, dv, _ = mosaic.backward(
            q,
            k,
            v,
            residuals,
            out,
            d_out,
            None,
            None,
            start_T[None],
            None,
            logits_scale=scale,
            logits_soft_cap=None,
            is_causal=True,
            ds_dtype=None,
            config=config,
        )
        return dq, dk, dv

    return jax.vmap(row)(q_BTNH, k_BTKH, v_BTKH, start_BT, out_BTNH, lse_BNT, d_out_BTNH)
