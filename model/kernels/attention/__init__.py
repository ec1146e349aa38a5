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
from jaxtyping import Array, Float, Int

from ...sharding import LogicalAxes, partition_spec
from ..backends import Backend, current_backend
from . import cpu, gpu, reference, tpu

SAVED = ("attention_output", "attention_log_sum_exp")
"""The names of the arrays that a rematerialisation policy should save."""


class Kernel(NamedTuple):
    """A backend's implementation.

    forward(q [B T N H], k [B T K H], v [B T K H], start [B T], scale)
        -> output [B T N H] in q's dtype, log-sum-exp of each query's scores [B N T] float32
    backward(q, k, v, start, scale, output, log-sum-exp, gradient of the output [B T N H])
        -> gradients of q, k and v, in their dtypes

    If `masks_windows`, both also take the `window`, and `start` is then the first token of each query's
    segment. Otherwise the window is already applied to `start`.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]
    length_multiple: int = 1
    """What T has to be a multiple of."""
    per_device: bool = True
    """Whether each device runs the kernel on its own rows and heads (`jax.shard_map`), because XLA cannot
    partition it."""
    masks_windows: bool = False
    head_dims: tuple[int, ...] | None = None
    """The head sizes that it takes, in increasing order; None: all. Smaller heads are padded with zeros."""

    why_not: Callable[[Any], str | None] = lambda dtype: None
    """Returns why it cannot be used for inputs of a dtype on the current mesh, or None."""


KERNELS: dict[Backend, Kernel] = {
    "reference": Kernel(reference.forward, reference.backward),
    "cpu": Kernel(cpu.forward, cpu.backward, per_device=False),
    "gpu": Kernel(
        gpu.forward, gpu.backward, length_multiple=128, head_dims=(64, 128, 256), why_not=gpu.why_not
    ),
    "tpu": Kernel(
        tpu.forward, tpu.backward, length_multiple=128, masks_windows=True, head_dims=(64, 128, 256)
    ),
}


def why_reference(head_dim: int, dtype: Any, backend: Backend | None = None) -> str | None:
    """Return why the reference is used instead of the kernel of `backend`, or None if that kernel is used.

    The backend is by default that of the current mesh."""
    kernel = KERNELS[backend or current_backend()]
    if kernel.head_dims is not None and head_dim > kernel.head_dims[-1]:
        return f"its kernel takes heads of at most {kernel.head_dims[-1]}, and these have {head_dim}"
    return kernel.why_not(dtype)


def _kernel(backend: Backend | None, q_BTNH: Array) -> Kernel:
    if why_reference(q_BTNH.shape[-1], q_BTNH.dtype, backend) is not None:
        return KERNELS["reference"]
    return KERNELS[backend or current_backend()]


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
    *,
    window: int | None = None,
    sinks_N: Float[Array, " N"] | None = None,
    backend: Backend | None = None,
    kernel: Kernel | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale * q k^T + mask) v, with grouped heads, in q's dtype. The softmax is float32.

    `window` is the most keys that a query sees, its own included. `kernel` is by default that of `backend`,
    which is by default that of the current mesh.

    Differentiable in q, k, v and `sinks_N`. A query that sees no key gives finite values and gradients on the
    CPU and with the reference; the flash kernels of accelerators expect every query to see itself.
    """
    kernel = kernel or _kernel(backend, q_BTNH)
    call, *arguments = _prepared(kernel, q_BTNH, k_BTKH, v_BTKH, start_BT, scale, window)
    return _unpadded(_attend(call, *arguments, sinks_N), q_BTNH)


def attention_to_merge(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
    *,
    window: int | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Return `attention` and the log-sum-exp of each query's scores, to merge it with that to other keys.

    Not differentiable."""
    call, *arguments = _prepared(_kernel(backend, q_BTNH), q_BTNH, k_BTKH, v_BTKH, start_BT, scale, window)
    out_BTNH, lse_BNT = call.forward(*arguments)
    return _unpadded(out_BTNH, q_BTNH), lse_BNT[..., : start_BT.shape[1]].swapaxes(1, 2)


def _prepared(
    kernel: Kernel, q: Array, k: Array, v: Array, start_BT: Array, scale: float, window: int | None
) -> tuple[_Call, Array, Array, Array, Array]:
    """Return the call, and q, k, v and `start` as the kernel takes them: padded to its multiple, where padded
    queries see themselves, and to one of its head sizes, and with the window in `start` unless the kernel
    masks it."""
    T, H = start_BT.shape[1], q.shape[-1]
    padding = -T % kernel.length_multiple
    wider = next(size for size in kernel.head_dims if size >= H) - H if kernel.head_dims else 0
    if padding or wider:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, wider))) for x in (q, k, v))
    if padding:
        own_BP = jnp.broadcast_to(jnp.arange(T, T + padding, dtype=start_BT.dtype), (len(start_BT), padding))
        start_BT = jnp.concatenate([start_BT, own_BP], axis=1)
    if window is not None and not kernel.masks_windows:
        start_BT = jnp.maximum(start_BT, jnp.arange(start_BT.shape[1]) - window + 1)
        window = None
    if kernel.per_device:
        k, v = _divisible_heads(k, q), _divisible_heads(v, q)
    return _Call(kernel, scale, window), q, k, v, start_BT


def _unpadded(out: Array, q_BTNH: Array) -> Array:
    return out[:, : q_BTNH.shape[1], :, : q_BTNH.shape[-1]]


class _Call(NamedTuple):
    """The static arguments of one call of `attention`."""

    kernel: Kernel
    scale: float
    window: int | None

    def forward(self, q: Array, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
        return self._run(self.kernel.forward, (_Q, _LSE), q, k, v, start)

    def backward(self, *arguments: Array) -> tuple[Array, Array, Array]:
        return self._run(self.kernel.backward, (_Q, _K, _K), *arguments)

    def _run(self, function: Callable, out_axes: tuple, *arguments: Array) -> Any:
        """Call `function(q, k, v, start, scale, *rest)`, on each device for its own rows and heads."""
        options = {"window": self.window} if self.kernel.masks_windows else {}

        def run(*arguments: Array) -> Any:
            return function(*arguments[:4], self.scale, *arguments[4:], **options)

        mesh = jax.sharding.get_abstract_mesh()
        if not self.kernel.per_device or mesh.empty or mesh.size == 1:
            return run(*arguments)
        q, k = arguments[0].shape, arguments[1].shape
        shapes = {_Q: q, _K: k, _START: q[:2], _LSE: (q[0], q[2], q[1])}
        specs = {axes: partition_spec(shape, axes, mesh) for axes, shape in shapes.items()}
        in_axes = (_Q, _K, _K, _START, _Q, _LSE, _Q)[: len(arguments)]
        return jax.shard_map(
            run,
            in_specs=tuple(specs[axes] for axes in in_axes),
            out_specs=tuple(specs[axes] for axes in out_axes),
            check_vma=False,
        )(*arguments)


_Q: LogicalAxes = ("rows", "tokens", "heads", "head_dim")
_K: LogicalAxes = ("rows", "tokens", "kv_heads", "head_dim")
_START: LogicalAxes = ("rows", "tokens")
_LSE: LogicalAxes = ("rows", "heads", "tokens")


def _divisible_heads(x_BTKH: Array, q_BTNH: Array) -> Array:
    """Repeat kv heads so that every device has those of its query heads.

    This is needed only if the mesh divides the query heads but not the kv heads."""
    mesh = jax.sharding.get_abstract_mesh()
    N, K = q_BTNH.shape[2], x_BTKH.shape[2]
    if mesh.empty or partition_spec((N,), ("heads",), mesh) == partition_spec((K,), ("kv_heads",), mesh):
        return x_BTKH
    return jnp.repeat(x_BTKH, N // K, axis=2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q: Array, k: Array, v: Array, start: Array, sinks: Any) -> Array:
    return _attend_forward(call, q, k, v, start, sinks)[0]


def _attend_forward(call: _Call, q, k, v, start, sinks) -> tuple[Array, tuple]:
    out_BTNH, lse_BNT = call.forward(q, k, v, start)
    if sinks is not None:
        # The sink adds exp(sink) to the softmax's denominator.
        with_sink_BNT = jnp.logaddexp(lse_BNT, sinks.astype(jnp.float32)[:, None])
        share_BTN = jnp.exp(lse_BNT - with_sink_BNT).swapaxes(1, 2)
        out_BTNH = (out_BTNH.astype(jnp.float32) * share_BTN[..., None]).astype(q.dtype)
        lse_BNT = with_sink_BNT
    out_BTNH = checkpoint_name(out_BTNH, SAVED[0])
    lse_BNT = checkpoint_name(lse_BNT, SAVED[1])
    return out_BTNH, (q, k, v, start, sinks, out_BTNH, lse_BNT)


def _attend_backward(call: _Call, saved: tuple, d_out_BTNH: Array) -> tuple:
    """The backward. With sinks, the kernel's own backward is right as it is, given the output and the
    log-sum-exp that include the sink: the probabilities and the rowwise sums that it derives from them do
    then include it."""
    q, k, v, start, sinks, out_BTNH, lse_BNT = saved
    dq, dk, dv = call.backward(q, k, v, start, out_BTNH, lse_BNT, d_out_BTNH)
    d_sinks = None
    if sinks is not None:
        pull_BTN = (d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1)
        prob_BNT = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse_BNT)
        d_sinks = -jnp.einsum("bnt,btn->n", prob_BNT, pull_BTN).astype(sinks.dtype)
    return dq, dk, dv, None, d_sinks


_attend.defvjp(_attend_forward, _attend_backward)
