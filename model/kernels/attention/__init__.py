"""Causal attention over packed rows, with its gradient.

One mask serves packing and padding: `start[b, t]`, the first key that query t of row b can see. Key j is
visible to query i if and only if start[b, i] <= j <= i. A sliding window of W keys moves the start of query i
up to i - W + 1. A sink is a learned logit per head that takes part in the softmax and has no value
(gpt-oss, arXiv:2508.10925).

Every backend's module has two functions, `forward` and `backward`. Everything else is written once, here:
sinks, sharding, and what is saved for the backward. The output and each query's log-sum-exp carry names, so
that a rematerialisation policy can save them (`SAVED`): the backward then never repeats the forward.

Letters: B rows, T tokens, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ..backends import Backend, current_backend
from . import cpu, reference

SAVED = ("attention_output", "attention_log_sum_exp")
"""The names of the arrays that a rematerialisation policy should save."""


class Kernel(NamedTuple):
    """A backend's implementation. Both functions take `start_BT` with the window already applied.

    forward(q [B T N H], k [B T K H], v [B T K H], start [B T], scale)
        -> output [B T N H] in q's dtype, log-sum-exp of each query's scores [B N T] float32
    backward(q, k, v, start, scale, output, log-sum-exp, gradient of the output [B T N H])
        -> gradients of q, k and v, in their dtypes
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


_KERNELS: dict[Backend, Kernel] = {
    "reference": Kernel(reference.forward, reference.backward),
    "cpu": Kernel(cpu.forward, cpu.backward),
    "gpu": Kernel(reference.forward, reference.backward),
    "tpu": Kernel(reference.forward, reference.backward),
}


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
    *,
    window: int | None = None,
    windowed: Bool[Array, ""] | None = None,
    sinks_N: Float[Array, " N"] | None = None,
    backend: Backend | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale * q k^T + mask) v, with grouped heads, in q's dtype. The softmax is float32.

    `window` is the most keys that a query sees, its own included. `windowed` says, as a traced value, whether
    this layer has the window at all (None: it has). `backend` is by default that of the current mesh.

    Differentiable in q, k, v and `sinks_N`. A query that sees no key gives finite values and gradients.
    """
    start_BT = _narrowed(start_BT, window, windowed)
    return _attend(_KERNELS[backend or current_backend()], scale, q_BTNH, k_BTKH, v_BTKH, start_BT, sinks_N)


def attention_to_merge(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
    *,
    window: int | None = None,
    windowed: Bool[Array, ""] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Return `attention` and the log-sum-exp of each query's scores, to merge it with that to other keys.

    Not differentiable."""
    kernel = _KERNELS[backend or current_backend()]
    out_BTNH, lse_BNT = kernel.forward(q_BTNH, k_BTKH, v_BTKH, _narrowed(start_BT, window, windowed), scale)
    return out_BTNH, lse_BNT.swapaxes(1, 2)


def _narrowed(start_BT: Array, window: int | None, windowed: Array | None) -> Array:
    """Apply the sliding window to the first key that each query sees."""
    if window is None:
        return start_BT
    narrowed_BT = jnp.maximum(start_BT, jnp.arange(start_BT.shape[1]) - window + 1)
    return narrowed_BT if windowed is None else jnp.where(windowed, narrowed_BT, start_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel: Kernel, scale: float, q: Array, k: Array, v: Array, start: Array, sinks: Any) -> Array:
    return _attend_forward(kernel, scale, q, k, v, start, sinks)[0]


def _attend_forward(kernel: Kernel, scale: float, q, k, v, start, sinks) -> tuple[Array, tuple]:
    out_BTNH, lse_BNT = kernel.forward(q, k, v, start, scale)
    if sinks is not None:
        # The sink adds exp(sink) to the softmax's denominator.
        with_sink_BNT = jnp.logaddexp(lse_BNT, sinks.astype(jnp.float32)[:, None])
        share_BTN = jnp.exp(lse_BNT - with_sink_BNT).swapaxes(1, 2)
        out_BTNH = (out_BTNH.astype(jnp.float32) * share_BTN[..., None]).astype(q.dtype)
        lse_BNT = with_sink_BNT
    out_BTNH = checkpoint_name(out_BTNH, SAVED[0])
    lse_BNT = checkpoint_name(lse_BNT, SAVED[1])
    return out_BTNH, (q, k, v, start, sinks, out_BTNH, lse_BNT)


def _attend_backward(kernel: Kernel, scale: float, saved: tuple, d_out_BTNH: Array) -> tuple:
    """With sinks, the kernel's own backward is right as it is, given the output and the log-sum-exp that
    include the sink: the probabilities and the rowwise sums that it derives from them do then include it."""
    q, k, v, start, sinks, out_BTNH, lse_BNT = saved
    dq, dk, dv = kernel.backward(q, k, v, start, scale, out_BTNH, lse_BNT, d_out_BTNH)
    d_sinks = None
    if sinks is not None:
        pull_BTN = (d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1)
        prob_BNT = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse_BNT)
        d_sinks = -jnp.einsum("bnt,btn->n", prob_BNT, pull_BTN).astype(sinks.dtype)
    return dq, dk, dv, None, d_sinks


_attend.defvjp(_attend_forward, _attend_backward)
