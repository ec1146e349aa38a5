"""Paged attention on NVIDIA GPUs: a Triton kernel that reads each page once, in place.

A program of the kernel takes one sequence, one kv head with all its query heads, and one part of the table
("flash decoding"): few sequences still fill the device. The parts are put together by their log-sum-exp.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from .reference import MASKED

_SMALLEST_DOT = 16  # rows of a product on tensor cores
_PROGRAMS = 264  # wanted at least: two for each multiprocessor of an H200
_WARPS, _STAGES = 4, 3


def attend(
    q_SNH: Float[Array, "S N H"],
    k_pages: Float[Array, "X K Z H"],
    v_pages: Float[Array, "X K Z H"],
    table_SP: Int[Array, "S P"],
    first_S: Int[Array, " S"],
    length_S: Int[Array, " S"],
    scale: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "S N H"], Float[Array, "S N"]]:
    """Return softmax(scale * q k^T) v in float32 over positions first <= p < length of each sequence, and the
    log-sum-exp of each query's scores."""
    S, N, H = q_SNH.shape
    K, P = k_pages.shape[1], table_SP.shape[1]
    G = N // K
    rows = max(_SMALLEST_DOT, pl.next_power_of_2(G))
    parts = min(P, pl.cdiv(_PROGRAMS, S * K))
    q_SKGH = jnp.pad(q_SNH.reshape(S, K, G, H), ((0, 0), (0, 0), (0, rows - G), (0, 0)))
    whole = pl.BlockSpec(k_pages.shape, lambda s, k, part: (0, 0, 0, 0))
    with warnings.catch_warnings():  # Triton in Pallas is deprecated from jax 0.12 on, without a replacement
        warnings.filterwarnings("ignore", message=".*Triton backend is deprecated")
        out, highest, total = pl.pallas_call(
            partial(_kernel, scale=scale, columns=pl.cdiv(P, parts)),
            grid=(S, K, parts),
            in_specs=[
                pl.BlockSpec((None, None, rows, H), lambda s, k, part: (s, k, 0, 0)),
                whole,
                whole,
                pl.BlockSpec((None, P), lambda s, k, part: (s, 0)),
                pl.BlockSpec((None,), lambda s, k, part: (s,)),
                pl.BlockSpec((None,), lambda s, k, part: (s,)),
            ],
            out_specs=[
                pl.BlockSpec((None, None, None, rows, H), lambda s, k, part: (s, k, part, 0, 0)),
                pl.BlockSpec((None, None, None, rows), lambda s, k, part: (s, k, part, 0)),
                pl.BlockSpec((None, None, None, rows), lambda s, k, part: (s, k, part, 0)),
            ],
            out_shape=[
                jax.ShapeDtypeStruct((S, K, parts, rows, H), jnp.float32),
                jax.ShapeDtypeStruct((S, K, parts, rows), jnp.float32),
                jax.ShapeDtypeStruct((S, K, parts, rows), jnp.float32),
            ],
            compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
            interpret=interpret,
            name="paged_attention",
        )(q_SKGH, k_pages, v_pages, table_SP, first_S, length_S)
    top = highest.max(2)
    weight = jnp.exp(highest - top[:, :, None])
    total = (total * weight).sum(2)
    some = jnp.where(total > 0, total, 1.0)
    mixed = (out * weight[..., None]).sum(2) / some[..., None]
    lse = top + jnp.log(some)
    return mixed[:, :, :G].reshape(S, N, H), lse[:, :, :G].reshape(S, N)


def _kernel(
    q_ref: Any,  # [rows, H]
    k_ref: Any,  # [X, K, Z, H]
    v_ref: Any,
    table_ref: Any,  # [P]
    first_ref: Any,  # []
    length_ref: Any,
    out_ref: Any,  # [rows, H]
    highest_ref: Any,  # [rows]
    total_ref: Any,
    *,
    scale: float,
    columns: int,
) -> None:
    head, part = pl.program_id(1), pl.program_id(2)
    rows, H = q_ref.shape
    Z = k_ref.shape[2]
    q, first, length = q_ref[...], first_ref[...], length_ref[...]
    begin = jnp.maximum(part * columns, first // Z)
    end = jnp.minimum((part + 1) * columns, pl.cdiv(length, Z))

    def add_page(column: Array, state: tuple) -> tuple:
        out, highest, total = state
        page = table_ref[column]
        k, v = k_ref[page, head], v_ref[page, head]
        scores = triton.dot(q, k.T) * scale
        position = column * Z + jnp.arange(Z)
        visible = jnp.broadcast_to(((position >= first) & (position < length))[None], scores.shape)
        new_highest = jnp.maximum(highest, jnp.where(visible, scores, MASKED).max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_highest[:, None]), 0.0)
        kept = jnp.exp(highest - new_highest)
        out = out * kept[:, None] + triton.dot(weights.astype(v.dtype), v)
        return out, new_highest, total * kept + weights.sum(-1)

    state = (
        jnp.zeros((rows, H), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out_ref[...], highest_ref[...], total_ref[...] = jax.lax.fori_loop(begin, end, add_page, state)
