"""Attention on TPUs: JAX's splash kernel.

A token's `start` names its segment, and a sliding window is part of the kernel's static mask, whose empty
blocks are skipped. The backward has one kernel for dq and another for dk and dv: the fused one would keep a
partial dq per block of keys, several GiB for long rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCKS = (512, 256, 128)
"""Blocks of queries and of keys. The largest that divides T is used; T is a multiple of 128."""


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_BT: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Return the output and the log-sum-exp of each query's scores. T is a multiple of 128.

    Query i sees the keys of its own segment from i - window + 1 (None: from the segment's first) to i."""
    q_BNTH, k_BKTH, v_BKTH = _heads_first(q_BTNH, k_BTKH, v_BTKH, scale)
    splash, kernel = _splash(), _kernel(q_BTNH.shape[1], q_BTNH.shape[2], window, interpret)

    def row(q: Array, k: Array, v: Array, segment_T: Array) -> tuple[Array, tuple[Array]]:
        segments = splash.SegmentIds(segment_T, segment_T)
        return splash._splash_attention_forward(
            kernel.forward_mask, q, k, v, segments, None, **kernel.options
        )

    out_BNTH, (lse_BNT,) = jax.vmap(row)(q_BNTH, k_BKTH, v_BKTH, segment_BT)
    return out_BNTH.swapaxes(1, 2), lse_BNT


def backward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_BT: Int[Array, "B T"],
    scale: float,
    out_BTNH: Float[Array, "B T N H"],
    lse_BNT: Float[Array, "B N T"],
    d_out_BTNH: Float[Array, "B T N H"],
    window: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Return the gradients of q, k and v. T is a multiple of 128."""
    q_BNTH, k_BKTH, v_BKTH = _heads_first(q_BTNH, k_BTKH, v_BTKH, scale)
    splash, kernel = _splash(), _kernel(q_BTNH.shape[1], q_BTNH.shape[2], window, interpret)

    def row(q, k, v, segment_T, out, lse_NT, d_out) -> tuple[Array, Array, Array]:
        segments = splash.SegmentIds(segment_T, segment_T)
        saved = (q, k, v, segments, None, out, lse_NT, kernel.forward_mask, kernel.dkv_mask)
        gradients = splash._splash_attention_bwd(**kernel.options, res=saved, do=d_out)
        return gradients[3:6]

    out_BNTH, d_out_BNTH = out_BTNH.swapaxes(1, 2), d_out_BTNH.swapaxes(1, 2)
    dq, dk, dv = jax.vmap(row)(q_BNTH, k_BKTH, v_BKTH, segment_BT, out_BNTH, lse_BNT, d_out_BNTH)
    dq = (dq * jnp.asarray(scale, dq.dtype)).astype(q_BTNH.dtype)
    return dq.swapaxes(1, 2), dk.astype(k_BTKH.dtype).swapaxes(1, 2), dv.astype(v_BTKH.dtype).swapaxes(1, 2)


class _Kernel(NamedTuple):
    """The splash kernel's tables for a length and a window, and its options."""

    forward_mask: Any
    dkv_mask: Any
    options: dict[str, Any]


def _splash() -> Any:
    """Return the kernel's module. Importing it takes a second, which servers on other devices save."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


@lru_cache(maxsize=64)
def _kernel(T: int, heads: int, window: int | None, interpret: bool) -> _Kernel:
    """Return the kernel of a length and a window.

    Its tables are made on the host in O(T^2), 8 CPU-seconds for 32k tokens, so they are made only once. They
    stay NumPy arrays: as arrays of JAX they would belong to the devices of one mesh."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

    splash = _splash()
    size = next(block for block in _BLOCKS if T % block == 0)
    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    of_heads = masks.MultiHeadMask([mask] * heads)
    shards = {"downcast_smem_data": True, "head_shards": 1, "q_seq_shards": 1}
    forward_mask, function = mask_info.process_mask(of_heads, (size, size), **shards)
    dkv_mask, _ = mask_info.process_mask_dkv(of_heads, (size, size), **shards, shrink_grid=True)
    options = {
        "save_residuals": True,
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        "block_sizes": splash.BlockSizes(
            block_q=size,
            block_kv=size,
            block_kv_compute=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_kv_dkv_compute=size,
            block_q_dq=size,
            block_kv_dq=size,
            use_fused_bwd_kernel=False,
        ),
        "residual_checkpoint_name": None,
        "mask_function": function,
        "attn_logits_soft_cap": None,
        "interpret": interpret,
    }
    return _Kernel(forward_mask, dkv_mask, options)


def _heads_first(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, scale: float) -> tuple[Array, Array, Array]:
    """Return scaled q [B N T H], k [B K T H] and v [B K T H]."""
    q_BTNH = q_BTNH * jnp.asarray(scale, q_BTNH.dtype)
    return q_BTNH.swapaxes(1, 2), k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
