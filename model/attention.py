"""Attention over keys that lie in several arrays, as decoding and prefill after a cached context need it.

Letters: S rows, T tokens, N query heads, K kv heads, H head dim, C keys of one array.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from .kernels.attention.cpu import MASKED


def attend_parts(
    q_STNH: Float[Array, "S T N H"],
    parts: list[tuple[Array, Array, Array]],
    scale: float,
) -> Float[Array, "S T N H"]:
    """Return softmax(scale * q k^T) v over C keys held in several arrays of S rows. The softmax is float32.

    A part is (k [S K H C], v [S K C H], visible [S T C]). Parts may have different dtypes; products with
    two-byte floats are summed in float32.
    """
    S, T, N, H = q_STNH.shape
    K = parts[0][0].shape[1]
    q = (q_STNH * jnp.asarray(scale, q_STNH.dtype)).reshape(S, T, K, N // K, H)
    q = q.transpose(0, 2, 3, 1, 4).reshape(S, K, N // K * T, H)

    def scores(keys: Array, visible: Array) -> Array:
        found = jnp.einsum("skqh,skhc->skqc", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
        found = found.reshape(S, K, N // K, T, keys.shape[3])
        return jnp.where(visible[:, None, None], found, MASKED)

    found = [scores(k, visible) for k, _, visible in parts]
    highest = jnp.stack([z.max(-1) for z in found]).max(0)[..., None]
    weights = [jnp.exp(z - highest) for z in found]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    mixed = sum(
        jnp.einsum(
            "skqc,skch->skqh",
            (w / total).astype(v.dtype).reshape(S, K, N // K * T, -1),
            v,
            preferred_element_type=jnp.float32,
        )
        for w, (_, v, _) in zip(weights, parts, strict=True)
    )
    mixed = mixed.reshape(S, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(S, T, N, H)
    return mixed.astype(q_STNH.dtype)
