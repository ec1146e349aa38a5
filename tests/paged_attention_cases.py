"""Sequences with keys and values in pages, and what attention to them is, in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from tinsmith.model.kernels.paged_attention.pages import Pages

S, N, K, H, Z, P, L = 5, 8, 2, 128, 16, 4, 2
SCALE = H**-0.5
FIRST, LENGTH = np.array([0, 3, 40, 49, 0], np.int32), np.array([1, 17, 64, 50, 33], np.int32)


def case(dtype, seed=0):
    """Queries, keys and values [L, pages, K, Z, H], and tables that share no page."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(S, N, H)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(L, 1 + S * P, K, Z, H)), dtype) for _ in "kv")
    table = 1 + rng.permutation(S * P).reshape(S, P).astype(np.int32)
    return q, k, v, jnp.asarray(table)


def expected(q, k, v, table, first, length, sinks=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((S, N, H))
    for s in range(S):
        keys, values = (x[np.asarray(table[s])].transpose(1, 0, 2, 3).reshape(K, -1, H) for x in (k, v))
        seen = slice(first[s], length[s])
        for n in range(N):
            scores = keys[n * K // N, seen] @ q[s, n] * SCALE
            weights = np.exp(scores - scores.max())
            sink = 0.0 if sinks is None else np.exp(sinks[n] - scores.max())
            out[s, n] = weights / (weights.sum() + sink) @ values[n * K // N, seen]
    return out


def pages_of(k, v, backend):
    order = (2, 0, 1, 3, 4) if backend == "tpu" else (0, 1, 2, 3, 4)
    return Pages(k.transpose(order), v.transpose(order), backend)
