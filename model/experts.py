"""Mixtures of experts: a router chooses a few MLPs for every token, and their outputs are summed.

    p = softmax(x Wr);  y = sum over the k largest p_e (divided by their sum if `normalised`) of p_e MLP_e(x)

or, with `config.SigmoidRouter`, the sigmoids of its groups.

Tokens are sorted by expert, and each expert's matrices are multiplied with its tokens alone
(`kernels/grouped_product`), so the cost follows the active parameters. The router works in float32 whatever
the dtype, so that sampler and trainer choose the same experts. A token's k outputs are summed in the order of
their probabilities.

An adapter of experts has the form of the hosted service: the factor at the hidden axis is shared by all
experts, the other one is each expert's own (`config.Site.shared`). The router has no adapter.

Letters: B rows, T tokens, S = B T, D hidden, E experts, k chosen experts, F width of an expert, R padded
rank, n adapters of a device batch, A = S k assignments of tokens to experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from .config import Clamp, Experts, SigmoidRouter
from .kernels.backends import Backend, current_backend
from .kernels.grouped_product import grouped_product
from .kernels.product import product
from .lora import LayerLora
from .sharding import partition_spec

EXPERT_SITES = ("expert_gate", "expert_up", "expert_down")


class Biases(NamedTuple):
    """The biases of experts."""

    gate: Float[Array, "E F"]
    up: Float[Array, "E F"]
    down: Float[Array, "E D"]


class Weights(NamedTuple):
    """The matrices of a mixture, and its biases if it has any. A `SigmoidRouter`'s is the correction."""

    router: Float[Array, "D E"]
    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    router_bias: Float[Array, " E"] | None = None
    biases: Biases | None = None


class Routing(NamedTuple):
    """The experts of every token in descending order of probability, and the weights of their outputs."""

    expert: Int[Array, "*S k"]
    weight: Float[Array, "*S k"]


def route(
    experts: Experts,
    weights: Weights,
    x: Float[Array, "*S D"],
    replayed: Int[Array, "*S k"] | None = None,
) -> Routing:
    """Choose each token's experts. The weights are float32.

    Tokens get the experts in `replayed` instead, in that order, with the probabilities that this router gives
    them; those with -1 there get the most probable ones as usual."""
    logits = jnp.matmul(x.astype(jnp.float32), weights.router.astype(jnp.float32), precision="highest")
    bias = None if weights.router_bias is None else weights.router_bias.astype(jnp.float32)
    if experts.sigmoid is not None:
        return _route_by_sigmoid(experts, experts.sigmoid, logits, bias, replayed)
    if bias is not None:
        logits = logits + bias
    probability = jax.nn.softmax(logits)
    weight, expert = jax.lax.top_k(probability, experts.chosen)
    if replayed is not None:
        expert = _given(replayed, expert)
        weight = jnp.take_along_axis(probability, expert, axis=-1)
    if not experts.normalised:
        return Routing(expert, weight)
    total = weight.sum(-1, keepdims=True)
    if replayed is not None:  # which this router may hold to be impossible
        total = jnp.maximum(total, 1e-30)
    return Routing(expert, weight / total)


def _given(replayed: Int[Array, "*S k"] | None, chosen: Int[Array, "*S k"]) -> Int[Array, "*S k"]:
    return chosen if replayed is None else jnp.where(replayed < 0, chosen, replayed.astype(chosen.dtype))


def _route_by_sigmoid(
    experts: Experts,
    router: SigmoidRouter,
    logits: Float[Array, "*S E"],
    correction: Array | None,
    replayed: Int[Array, "*S k"] | None,
) -> Routing:
    probability = jax.nn.sigmoid(logits)
    rank = jax.lax.stop_gradient(probability)
    if correction is not None:
        rank = rank + jax.lax.stop_gradient(correction)
    if router.groups > 1:
        by_group = rank.reshape(*rank.shape[:-1], router.groups, -1)
        best_two = jax.lax.top_k(by_group, 2)[0].sum(-1)
        _, chosen = jax.lax.top_k(best_two, router.groups_chosen)
        is_chosen = jax.nn.one_hot(chosen, router.groups, dtype=bool).any(-2)
        rank = jnp.where(is_chosen[..., None], by_group, -jnp.inf).reshape(rank.shape)
    expert = _given(replayed, jax.lax.top_k(rank, experts.chosen)[1])
    weight = jnp.take_along_axis(probability, expert, axis=-1)
    if experts.normalised:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return Routing(expert, weight * router.scaling)


def mixture(
    experts: Experts,
    weights: Weights,
    x_BTD: Float[Array, "B T D"],
    lora: LayerLora | None,
    activation: Callable[[Array, Array], Array],
    replayed_BTk: Int[Array, "B T k"] | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T k"]]:
    """Return the experts' weighted sum for every token, in x's dtype, and the experts chosen.

    `replayed_BTk` are the experts to use instead of the router's choice (`route`).

    `activation(gate, up)` gives an expert's hidden units, unless the experts have a `Clamp`. On a mesh, every
    device sorts the tokens of its own rows. The experts' width is cut over `tensor`; their other axes are
    gathered, as for dense layers.
    """
    rows = len(x_BTD)
    if experts.clamp is not None:
        activation = partial(clamped, experts.clamp)
    adapters = None
    if lora is not None and any(name in lora.pairs for name in EXPERT_SITES):
        pairs = {name: lora.pairs[name] for name in EXPERT_SITES if name in lora.pairs}
        alone = len(lora.scale_n) == 1 or lora.row_adapter_B is None
        adapter_B = jnp.zeros(rows, jnp.int32) if alone else lora.row_adapter_B
        adapters = _Adapters(pairs, lora.scale_n[adapter_B], adapter_B)
    dtype = x_BTD.dtype if lora is None else lora.dtype or x_BTD.dtype
    mesh = jax.sharding.get_abstract_mesh()
    run = partial(_mixture, experts, activation, current_backend(), dtype)
    if mesh.empty or mesh.size == 1:
        return run(None, weights, x_BTD, adapters, replayed_BTk)
    by_row = partition_spec(x_BTD.shape, ("rows", "tokens", "hidden"), mesh)
    (width,) = partition_spec((experts.width,), ("ff",), mesh)
    specs = Weights(P(), P(None, None, width), P(None, None, width), P(None, width, None))
    if weights.router_bias is not None:
        specs = specs._replace(router_bias=P())
    if weights.biases is not None:
        specs = specs._replace(biases=Biases(P(None, width), P(None, width), P()))
    adapter_specs = None
    if adapters is not None:
        pair_specs = {name: _cut(name, pair, width) for name, pair in adapters.pairs.items()}
        adapter_specs = _Adapters(pair_specs, P(by_row[0]), P(by_row[0]))
    return jax.shard_map(
        partial(run, width),
        in_specs=(specs, by_row, adapter_specs, None if replayed_BTk is None else by_row),
        out_specs=(by_row, by_row),
        check_vma=False,
    )(weights, x_BTD, adapters, replayed_BTk)


class _Adapters(NamedTuple):
    """The adapters of a device batch: their pairs by matrix, and each row's scale and adapter."""

    pairs: dict[str, dict[str, Array]]
    scale_B: Float[Array, " B"]
    adapter_B: Int[Array, " B"]


def _cut(name: str, pair: dict[str, Array], width: Any) -> dict[str, P]:
    """Return how the factors of a matrix are cut: each expert's own factor along the experts' width."""
    if name == "expert_down":
        return {"a": P(None, None, width, None), "b": P()}
    return {"a": P(), "b": P(None, None, None, width)}


def _mixture(
    experts: Experts,
    activation: Callable[[Array, Array], Array],
    backend: Backend,
    dtype: Any,
    summed_over: Any,
    weights: Weights,
    x_BTD: Array,
    adapters: _Adapters | None,
    replayed_BTk: Array | None,
) -> tuple[Array, Array]:
    """Compute `mixture` on one device. `dtype` is that of adapters. `summed_over` names the mesh axes over
    which the experts' width is cut."""
    B, T, D = x_BTD.shape
    S, E, k = B * T, experts.count, experts.chosen
    x_SD = x_BTD.reshape(S, D)
    replayed_Sk = None if replayed_BTk is None else replayed_BTk.reshape(S, k)
    expert_Sk, weight_Sk = route(experts, weights, x_SD, replayed_Sk)

    # Sorted by expert, and among an expert's tokens by adapter.
    n = 1 if adapters is None else next(iter(adapters.pairs.values()))["a"].shape[0]
    adapter_S1 = 0 if adapters is None else jnp.repeat(adapters.adapter_B, T)[:, None]
    group_A = (expert_Sk * n + adapter_S1).reshape(-1)
    order_A = jnp.argsort(group_A, stable=True)
    inverse_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(S * k, dtype=order_A.dtype))
    sizes_En = jnp.zeros(E * n, jnp.int32).at[group_A].add(1)
    sizes_E = sizes_En.reshape(E, n).sum(1)

    def spread(x: Array) -> Array:
        return _spread(x.reshape(S, -1), order_A, inverse_A)

    def gathered(y_AO: Array) -> Array:
        """Return each token's sum over its experts in float32, weighted, [S, O]."""
        y_SkO = _permuted(y_AO, inverse_A, order_A).reshape(S, k, -1)
        return (weight_Sk[..., None] * y_SkO.astype(jnp.float32)).sum(1)

    def own(name: str, side: str) -> Array:
        """Return every expert's own factors, one for each adapter, in the order of `sizes_En`."""
        assert adapters is not None
        factor_nEIO = adapters.pairs[name][side]
        return factor_nEIO.swapaxes(0, 1).reshape(E * n, *factor_nEIO.shape[2:])

    def shared(x_BTI: Array, name: str, side: str) -> Array:
        """Multiply each row with its adapter's shared factor."""
        assert adapters is not None
        factor_nIO = adapters.pairs[name][side]
        return product(x_BTI, factor_nIO[0] if n == 1 else factor_nIO[adapters.adapter_B])

    def into(name: str, w_EDF: Array, bias_EF: Array | None) -> Array:
        y_AF = grouped_product(x_AD, w_EDF, sizes_E, backend)
        if bias_EF is not None:
            y_AF = y_AF + bias_EF[group_A[order_A] // n]
        if adapters is None or name not in adapters.pairs:
            return y_AF
        narrow_BTR = shared(x_BTD.astype(dtype), name, "a") * scale_B11
        delta_AF = grouped_product(spread(narrow_BTR), own(name, "b"), sizes_En, backend)
        return y_AF + delta_AF.astype(y_AF.dtype)

    x_AD = spread(x_SD)
    scale_B11 = None if adapters is None else adapters.scale_B[:, None, None].astype(dtype)
    biases = weights.biases
    gate_AF = into("expert_gate", weights.gate, None if biases is None else biases.gate)
    up_AF = into("expert_up", weights.up, None if biases is None else biases.up)
    h_AF = activation(gate_AF[None], up_AF[None])[0]
    y_SD = gathered(grouped_product(h_AF, weights.down, sizes_E, backend))
    if adapters is not None and "expert_down" in adapters.pairs:
        narrow_AR = grouped_product(h_AF.astype(dtype), own("expert_down", "a"), sizes_En, backend)
        narrow_BTR = gathered(narrow_AR).astype(dtype).reshape(B, T, -1) * scale_B11
        y_SD = y_SD + shared(narrow_BTR, "expert_down", "b").reshape(S, D).astype(jnp.float32)
    if summed_over is not None:
        y_SD = jax.lax.psum(y_SD, summed_over)
    if biases is not None:
        y_SD = y_SD + (weight_Sk[..., None] * biases.down.astype(jnp.float32)[expert_Sk]).sum(1)
    return y_SD.astype(x_BTD.dtype).reshape(B, T, D), expert_Sk.reshape(B, T, k)


@partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False, static_argnums=0)
def clamped(
    clamp: Clamp, gate_BTF: Float[Array, "B T F"], up_BTF: Float[Array, "B T F"]
) -> Float[Array, "B T F"]:
    """Return the activation of `config.Clamp`, computed in float32 and rounded once to the inputs' dtype."""
    gate32 = jnp.minimum(gate_BTF.astype(jnp.float32), clamp.limit)
    up32 = jnp.clip(up_BTF.astype(jnp.float32), -clamp.limit, clamp.limit)
    return ((up32 + 1) * gate32 * jax.nn.sigmoid(clamp.slope * gate32)).astype(gate_BTF.dtype)


@jax.custom_vjp
def _spread(
    x_SD: Float[Array, "S D"], order_A: Int[Array, " A"], inverse_A: Int[Array, " A"]
) -> Float[Array, "A D"]:
    """Return every token once for each of its experts, in the order of `order_A`.

    The gradient gathers and sums in a fixed order, where autodiff would scatter."""
    return x_SD[order_A // (len(order_A) // len(x_SD))]


def _spread_forward(x_SD: Array, order_A: Array, inverse_A: Array) -> tuple[Array, tuple]:
    return _spread(x_SD, order_A, inverse_A), (len(x_SD), inverse_A)


def _spread_backward(kept: tuple, dy_AD: Array) -> tuple[Array, None, None]:
    S, inverse_A = kept
    dx_SkD = dy_AD[inverse_A].reshape(S, -1, dy_AD.shape[-1])
    return dx_SkD.astype(jnp.float32).sum(1).astype(dy_AD.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _permuted(
    y_AO: Float[Array, "A O"], order_A: Int[Array, " A"], inverse_A: Int[Array, " A"]
) -> Float[Array, "A O"]:
    """Return y[order]. `inverse_A` is the inverse permutation, which the gradient gathers by."""
    return y_AO[order_A]


_permuted.defvjp(lambda y, order, inverse: (y[order], inverse), lambda inverse, dy: (dy[inverse], None, None))
