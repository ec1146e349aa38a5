"""LoRA adapters (arXiv:2106.09685) as plain float32 pytrees beside the frozen base.

One adapter:

    {"layers": {"q_proj": {"a": [L, in, R], "b": [L, R, out]}, ...},
     "unembed": {"a": [D, R], "b": [R, V]}}

with only the keys that are trained. Of a matrix that every expert has, one factor has an axis more for the
experts, [L, E, ...], and the other is shared by all experts (`config.Site.shared`). A decoder with several
stacks has a tree of matrices for each of them below "layers" (`config.Stack`).

R is padded to a bucket, so that few programs are compiled. The padded columns of `a` and rows of `b` start at
zero, get zero gradients and stay zero. The delta of a matrix is (alpha / rank) x A B, with the rank before
padding.

Letters: B rows, T tokens, D hidden, V vocab, R padded rank, L layers, n adapters of a device batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .config import ModelConfig, Site, Stack
from .kernels.product import Form, product
from .sharding import WITHOUT_FSDP

Adapter = dict[str, Any]
LoraStack = dict[str, Any]

RANK_BUCKETS = (8, 16, 32, 64, 128, 256, 512)


def pad_rank(rank: int) -> int:
    """Return the smallest bucket that holds `rank`. Raises ValueError outside 1..512."""
    for bucket in RANK_BUCKETS:
        if 0 < rank <= bucket:
            return bucket
    raise ValueError(f"rank must be between 1 and {RANK_BUCKETS[-1]}, not {rank}")


def init_lora(
    config: ModelConfig,
    seed: int,
    rank: int,
    *,
    train_attn: bool = True,
    train_mlp: bool = True,
    train_unembed: bool = True,
    padded_rank: int | None = None,
) -> Adapter:
    """Make a new adapter in host memory: A is uniform in +-1/sqrt(fan_in) and B zero, so the delta is zero.

    This is PEFT's default, `kaiming_uniform_(A, a=sqrt(5))`. The arrays are NumPy float32, so that a seed
    gives the same adapter on every backend and mesh; the caller puts them on devices.
    """
    padded_rank = pad_rank(rank) if padded_rank is None else padded_rank
    sites = trainable(config)
    streams = np.random.SeedSequence(seed % 2**64).spawn(len(sites) + 1)  # the same whatever is trained
    trained = {"attn": train_attn, "mlp": train_mlp}

    def pair(stream: np.random.SeedSequence, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        a, b = (np.zeros(shapes[side], np.float32) for side in "ab")
        bound = 1 / np.sqrt(a.shape[-2])
        drawn = np.random.default_rng(stream).uniform(-bound, bound, (*a.shape[:-1], rank))
        a[..., :rank] = drawn
        return {"a": a, "b": b}

    adapter: Adapter = {"layers": {}}
    for (stack, site), stream in zip(sites, streams[:-1], strict=True):
        if site.part is not None and trained[site.part]:
            at = adapter["layers"] if stack.key is None else adapter["layers"].setdefault(stack.key, {})
            at[site.name] = pair(stream, pair_shapes(stack, site, padded_rank))
    if train_unembed:
        shapes = {"a": (config.hidden_size, padded_rank), "b": (padded_rank, config.vocab_size)}
        adapter["unembed"] = pair(streams[-1], shapes)
    return adapter


def trainable(config: ModelConfig) -> list[tuple[Stack, Site]]:
    """List the matrices of the layers that an adapter may have, stack after stack."""
    return [(stack, site) for stack in config.all_stacks for site in stack.layer.sites if site.part]


def pairs(adapter: Adapter, config: ModelConfig) -> Iterator[tuple[Stack, Site, dict[str, Any]]]:
    """Yield the matrices of the layers that an adapter has."""
    for stack, site in trainable(config):
        if (pair := stack.of(adapter["layers"]).get(site.name)) is not None:
            yield stack, site, pair


def pair_shapes(stack: Stack, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a matrix's two factors in an adapter."""
    return {side: (len(stack.layers), *shape) for side, shape in site.factors(rank).items()}


def logical_axes(adapter: Adapter, config: ModelConfig) -> Adapter:
    """Return the adapter's tree with a tuple of logical axis names (`sharding.RULES`) at each leaf.

    A pair is cut like its matrix, but over `tensor` and `expert` alone: each device then adds the part of the
    delta that belongs to its part of the product, and the gradients are made where they stay.
    """
    axes: Adapter = {"layers": {}}
    for stack, site, pair in pairs(adapter, config):
        at = axes["layers"] if stack.key is None else axes["layers"].setdefault(stack.key, {})
        into, out = (WITHOUT_FSDP.get(name, name) for name in site.axes)
        sides = {"a": (into, "hidden"), "b": ("hidden", out)}
        at[site.name] = {
            side: ("layers", *(() if pair[side].ndim == 3 else ("experts",)), *axes)
            for side, axes in sides.items()
        }
    if "unembed" in adapter:
        axes["unembed"] = {"a": ("hidden", "hidden"), "b": ("hidden", "vocab")}
    return axes


def stack_adapters(adapters: tuple[Adapter, ...], scale_n: Float[Array, " n"]) -> LoraStack:
    """Stack adapters with equal keys and equal padded rank for one device batch. Differentiable.

    `scale_n` is alpha / rank of each. Returns {"layers": {name: {"a": [L, n, in, R], "b": [L, n, R, out]}},
    "unembed": {"a": [n, D, R], "b": [n, R, V]}, "scale": [n]}.
    """
    stack: LoraStack = {
        "layers": jax.tree.map(lambda *x: jnp.stack(x, axis=1), *[a["layers"] for a in adapters]),
        "scale": scale_n,
    }
    if "unembed" in adapters[0]:
        stack["unembed"] = jax.tree.map(lambda *x: jnp.stack(x), *[a["unembed"] for a in adapters])
    return stack


@partial(jax.jit, static_argnames="dtype")
def contained(stack: LoraStack, dtype: Any) -> LoraStack:
    """Return a stack for `delta`'s `each_once`, with the pairs of layers in `dtype`.

    There a product of zero and a value that is not finite would spread from one adapter to all rows. Such
    values become zero, and the scale of their adapter NaN: its own rows alone are not finite.
    """
    n = len(stack["scale"])
    pairs = {name: part for name, part in stack.items() if name != "scale"}

    def is_finite(path: tuple, leaf: Array) -> Bool[Array, " n"]:
        by_adapter = leaf if path[0].key == "unembed" else leaf.swapaxes(0, 1)
        return jnp.isfinite(by_adapter).reshape(n, -1).all(-1)

    def clean(path: tuple, leaf: Array) -> Array:
        finite = jnp.where(jnp.isfinite(leaf), leaf, 0)
        return finite if path[0].key == "unembed" else finite.astype(dtype)

    finite_n = jnp.stack(jax.tree.leaves(jax.tree_util.tree_map_with_path(is_finite, pairs))).all(0)
    return jax.tree_util.tree_map_with_path(clean, pairs) | {
        "scale": jnp.where(finite_n, stack["scale"], jnp.nan)
    }


class LayerLora(NamedTuple):
    """One layer's slice of a stack, as the scan passes it to a block. `dtype` is the dtype of the computation
    of deltas (None: that of the inputs). `each_once` is `delta`'s."""

    pairs: dict[str, dict[str, Array]]
    scale_n: Float[Array, " n"]
    row_adapter_B: Int[Array, " B"] | None
    dtype: Any = None
    each_once: bool = False

    def add(self, name: str, x_BTI: Array, y_BTO: Array, form: Form = Form.PLAIN) -> Array:
        """Return y plus the delta of matrix `name` at x, or y itself if that matrix has no adapter."""
        if name not in self.pairs:
            return y_BTO
        x_BTI = x_BTI.astype(self.dtype or x_BTI.dtype)
        added = delta(x_BTI, self.pairs[name], self.scale_n, self.row_adapter_B, self.each_once, form)
        return y_BTO + added.astype(y_BTO.dtype)


def delta(
    x_BTI: Float[Array, "B T I"],
    pair: dict[str, Array],
    scale_n: Float[Array, " n"],
    row_adapter_B: Int[Array, " B"] | None,
    each_once: bool = False,
    form: Form = Form.PLAIN,
) -> Float[Array, "B T O"]:
    """Return scale x A B, each row with its own adapter; `pair` is {"a": [n, I, R], "b": [n, R, O]}.

    A single adapter is a plain product and ignores `row_adapter_B`. A and B are cast to x's dtype only here;
    the adapter itself stays float32.

    Usually each row's adapter is gathered. With `each_once`, every row is multiplied by all A, side by side,
    and what is not its own is masked before the product with all B: for a few tokens, where reading the
    adapters takes longer than computing with them. The stack must come from `contained`.
    """
    a, b = pair["a"], pair["b"]
    if a.shape[0] == 1:
        scale = scale_n[0].astype(x_BTI.dtype)
        return product(product(x_BTI, a[0], form) * scale, b[0], form)
    scale_B11 = scale_n[row_adapter_B, None, None].astype(x_BTI.dtype)
    if each_once:
        own_B1nR = (jnp.asarray(row_adapter_B)[:, None] == jnp.arange(len(a)))[:, None, :, None]
        x_BTnR = jnp.einsum("bti,nir->btnr", x_BTI, a.astype(x_BTI.dtype)) * scale_B11[..., None]
        return jnp.einsum("btnr,nro->bto", jnp.where(own_B1nR, x_BTnR, 0), b.astype(x_BTI.dtype))
    return product(product(x_BTI, a[row_adapter_B], form) * scale_B11, b[row_adapter_B], form)
