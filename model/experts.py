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
from jaxtyping import Array, Bool, Float, Int

from .config import Clamp, Experts, SigmoidRouter
from .counts import SPARE_ROWS
from .kernels.backends import Backend, current_backend
from .kernels.grouped_product import grouped_product
from .kernels.grouped_product.stacked import Stacked
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
    gate: Float[Array, "E D F"] | Stacked | None  # None for experts without a gate
    up: Float[Array, "E D F"] | Stacked
    down: Float[Array, "E F D"] | Stacked
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
    activation: Callable[..., Array],
    replayed_BTk: Int[Array, "B T k"] | None = None,
    latent_BTD: Float[Array, "B T latent"] | None = None,
) -> tuple[Float[Array, "B T out"], Int[Array, "B T k"]]:
    """Return the experts' weighted sum for every token, in x's dtype, and the experts chosen.

    `replayed_BTk` are the experts to use instead of the router's choice (`route`).

    `activation(gate, up)`, or `activation(up)` of experts without a gate, gives an expert's hidden units,
    unless the experts have a `Clamp`. If there is a `latent`, the experts work on it, and D of their matrices
    is its size; the router chooses by x.

    On a mesh, every device sorts the tokens of its own rows. The experts' width is cut over `tensor`. Over
    `expert`, each device has some of the experts: the devices exchange their tokens, each adds up its own
    experts' outputs for all of these tokens, and the sums over devices return to the tokens' own devices.
    Other axes of the matrices are gathered, as for dense layers.
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
        return run(_Cut(), weights, x_BTD, latent_BTD, adapters, replayed_BTk)
    by_row = partition_spec(x_BTD.shape, ("rows", "tokens", "hidden"), mesh)
    spec = partition_spec((experts.count, experts.width), ("experts", "ff"), mesh)
    number, width = map(_names, spec)
    cut = _Cut(number, width, bool(number) and {*number} <= {*_names(by_row[0])})
    into = P(number, None, width)
    specs = Weights(P(), None if weights.gate is None else into, into, P(number, width, None))
    if weights.router_bias is not None:
        specs = specs._replace(router_bias=P())
    if weights.biases is not None:
        specs = specs._replace(biases=Biases(P(number, width), P(number, width), P()))
    adapter_specs = None
    if adapters is not None:
        pair_specs = {name: _cut_pair(name, pair, cut) for name, pair in adapters.pairs.items()}
        adapter_specs = _Adapters(pair_specs, P(by_row[0]), P(by_row[0]))
    return jax.shard_map(
        partial(run, cut),
        in_specs=(
            specs,
            by_row,
            None if latent_BTD is None else by_row,
            adapter_specs,
            None if replayed_BTk is None else by_row,
        ),
        out_specs=(by_row, by_row),
        check_vma=False,
    )(weights, x_BTD, latent_BTD, adapters, replayed_BTk)


class _Cut(NamedTuple):
    """The mesh axes over which the experts and their width are cut; `rows` says whether the rows of tokens
    are cut over those of the experts too."""

    experts: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    rows: bool = False


def _names(part: Any) -> tuple[str, ...]:
    """Return the mesh axes in one part of a PartitionSpec."""
    return (part,) if isinstance(part, str) else tuple(part or ())


class _Adapters(NamedTuple):
    """The adapters of a device batch: their pairs by matrix, and each row's scale and adapter."""

    pairs: dict[str, dict[str, Array]]
    scale_B: Float[Array, " B"]
    adapter_B: Int[Array, " B"]


def _cut_pair(name: str, pair: dict[str, Array], cut: _Cut) -> dict[str, P]:
    """Return how the factors of a matrix are cut: each expert's own factor like the expert's matrix."""
    if name == "expert_down":
        return {"a": P(None, cut.experts, cut.width, None), "b": P()}
    return {"a": P(), "b": P(None, cut.experts, None, cut.width)}


def _mixture(
    experts: Experts,
    activation: Callable[..., Array],
    backend: Backend,
    dtype: Any,
    cut: _Cut,
    weights: Weights,
    x_BTD: Array,
    latent_BTD: Array | None,
    adapters: _Adapters | None,
    replayed_BTk: Array | None,
) -> tuple[Array, Array]:
    """Compute `mixture` on one device, which has the part of the weights that `cut` says. `dtype` is that of
    adapters."""
    (B, T, D), k = x_BTD.shape, experts.chosen
    replayed_Sk = None if replayed_BTk is None else replayed_BTk.reshape(-1, k)
    routing = route(experts, weights, x_BTD.reshape(-1, D), replayed_Sk)
    expert_Sk, weight_Sk = routing
    x = x_BTD if latent_BTD is None else latent_BTD
    if cut.rows:
        gather = partial(jax.lax.all_gather, axis_name=cut.experts, tiled=True)
        x, routing = gather(x), Routing(*map(gather, routing))
        if adapters is not None:
            adapters = _Adapters(adapters.pairs, gather(adapters.scale_B), gather(adapters.adapter_B))
    y_SD = _sum_over_own(experts, activation, backend, dtype, cut, weights, x, routing, adapters)
    if cut.rows:
        y_SD = jax.lax.psum_scatter(y_SD, cut.experts, tiled=True)
    if summed_over := (() if cut.rows else cut.experts) + cut.width:
        y_SD = jax.lax.psum(y_SD, summed_over)
    if weights.biases is not None:
        y_SD = y_SD + (weight_Sk[..., None] * weights.biases.down.astype(jnp.float32)[expert_Sk]).sum(1)
    return y_SD.astype(x_BTD.dtype).reshape(B, T, -1), expert_Sk.reshape(B, T, k)


def _sum_over_own(
    experts: Experts,
    activation: Callable[..., Array],
    backend: Backend,
    dtype: Any,
    cut: _Cut,
    weights: Weights,
    x_BTD: Float[Array, "B T D"],
    routing: Routing,
    adapters: _Adapters | None,
) -> Float[Array, "S D"]:
    """Return each token's weighted sum in float32 over those of its experts that this device has, without
    the biases of the last matrices.

    Assignments are sorted by expert, and among an expert's by adapter; those to other devices' experts come
    last. How many there are of each kind depends on the router. So at first as many rows are computed as most
    devices need, and then, only on a device that needs them, more of them in turns of the same size.
    """
    B, T, D = x_BTD.shape
    S, k = B * T, experts.chosen
    devices = jax.lax.axis_size(cut.experts) if cut.experts else 1
    E = experts.count // devices
    first = jax.lax.axis_index(cut.experts) * E if cut.experts else 0
    n = 1 if adapters is None else next(iter(adapters.pairs.values()))["a"].shape[0]
    adapter_S1 = 0 if adapters is None else jnp.repeat(adapters.adapter_B, T)[:, None]
    own_Sk = routing.expert - first
    group_Sk = own_Sk * n + adapter_S1
    if devices > 1:
        group_Sk = jnp.where((own_Sk >= 0) & (own_Sk < E), group_Sk, E * n)
    group_A = group_Sk.reshape(-1)
    A = S * k
    order_A = jnp.argsort(group_A, stable=True)
    place_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(A, dtype=order_A.dtype))
    sizes_En = jnp.zeros(E * n, jnp.int32).at[group_A].add(1)  # other devices' are out of bounds: dropped

    def sum_of(part: _Part, sizes_En: Array) -> Array:
        return _sum_of_part(
            experts, activation, backend, dtype, weights, x_BTD, routing.weight, adapters, part, sizes_En, n
        )

    if devices == 1:
        return sum_of(_Part(order_A, place_A, group_A[order_A] // n), sizes_En)
    rows = A if A <= AT_ONCE else -(-int(A / devices * SPARE_ROWS) // 8) * 8
    turns, end_En = -(-A // rows), jnp.cumsum(sizes_En)
    order_A = jnp.pad(order_A, (0, turns * rows - A))

    def turn(begin: Array | int) -> Array:
        order_C = jax.lax.dynamic_slice_in_dim(order_A, begin, rows)
        end = jnp.minimum(begin + rows, end_En[-1])
        place = jnp.where((place_A >= begin) & (place_A < end), place_A - begin, rows)
        sizes = jnp.diff(jnp.clip(end_En - begin, 0, rows), prepend=0)
        expert_C = jnp.minimum(group_A[order_C] // n, E - 1)
        return sum_of(_Part(order_C, place, expert_C, jnp.arange(rows) < end - begin), sizes)

    nothing = jnp.zeros((S, D), jnp.float32)

    def add_turn(y_SD: Array, begin: Array) -> tuple[Array, None]:
        more = _again(lambda begin: jax.lax.cond(begin < end_En[-1], turn, lambda _: nothing, begin))
        return y_SD + more(begin), None

    def others() -> Array:
        return jax.lax.scan(add_turn, nothing, jnp.arange(1, turns) * rows)[0]

    y_SD = turn(0)
    if turns > 1:
        y_SD = y_SD + _again(lambda: jax.lax.cond(end_En[-1] > rows, others, lambda: nothing))()
    return y_SD


AT_ONCE = 1 << 14
"""So many assignments are always computed at once, whatever share of them is a device's own. Of more, a
device's first turn has `SPARE_ROWS` times its equal share."""

_again = partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)


class _Part(NamedTuple):
    """Some of the assignments, in order.

    `order_C` are their numbers, `place_A` the place of each assignment among them (C if it is not there), and
    `expert_C` their experts. Only those that are `real_C` count; all if it is None.
    """

    order_C: Int[Array, " C"]
    place_A: Int[Array, " A"]
    expert_C: Int[Array, " C"]
    real_C: Bool[Array, " C"] | None = None

    def real(self, y_CO: Float[Array, "C O"]) -> Float[Array, "C O"]:
        """Return zeros for rows that do not count."""
        return y_CO if self.real_C is None else jnp.where(self.real_C[:, None], y_CO, 0)

    def at(self, y_CO: Float[Array, " C *O"], place: Int[Array, "*A"]) -> Float[Array, "*rest"]:
        """Return the rows at some places; zeros for places of assignments that are not there."""
        mode = "promise_in_bounds" if self.real_C is None else "fill"
        return y_CO.at[place].get(mode=mode, fill_value=0)

    def sum(self, y_CO: Float[Array, "C O"], weight_Sk: Float[Array, "S k"]) -> Float[Array, "S O"]:
        """Return each token's weighted sum over its assignments in float32, in their order."""
        place_Sk = self.place_A.reshape(weight_Sk.shape)
        if self.real_C is None:
            return (weight_Sk[..., None] * self.at(y_CO, place_Sk).astype(jnp.float32)).sum(1)
        # Of few rows that are there, without an array of all assignments.
        by_choice = zip(weight_Sk.T, place_Sk.T, strict=True)
        return sum(weight[:, None] * self.at(y_CO, place).astype(jnp.float32) for weight, place in by_choice)

    def token(self, tokens: int) -> Int[Array, " C"]:
        """Return the token of each row."""
        return self.order_C // (len(self.place_A) // tokens)


def _sum_of_part(
    experts: Experts,
    activation: Callable[..., Array],
    backend: Backend,
    dtype: Any,
    weights: Weights,
    x_BTD: Float[Array, "B T D"],
    weight_Sk: Float[Array, "S k"],
    adapters: _Adapters | None,
    part: _Part,
    sizes_En: Int[Array, " En"],
    n: int,
) -> Float[Array, "S D"]:
    """Return `_sum_over_own` for some of the assignments, of which `sizes_En` belong to each expert and
    adapter."""
    B, T, D = x_BTD.shape
    S, E = B * T, len(sizes_En) // n
    sizes_E = sizes_En.reshape(E, n).sum(1)

    def grouped(x_CI: Array, w_GIO: Array | Stacked, sizes_G: Array) -> Array:
        return part.real(grouped_product(x_CI, w_GIO, sizes_G, backend))

    def spread(x: Array) -> Array:
        return _spread(x.reshape(S, -1), part)

    def gathered(y_CO: Array) -> Array:
        return _weighted_sum(y_CO, weight_Sk, part)

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

    def into(name: str, w_EDF: Array | Stacked, bias_EF: Array | None) -> Array:
        y_CF = grouped(x_CD, w_EDF, sizes_E)
        if bias_EF is not None:
            y_CF = y_CF + bias_EF[part.expert_C]
        if adapters is None or name not in adapters.pairs:
            return y_CF
        narrow_BTR = shared(x_BTD.astype(dtype), name, "a") * scale_B11
        delta_CF = grouped(spread(narrow_BTR), own(name, "b"), sizes_En)
        return y_CF + delta_CF.astype(y_CF.dtype)

    x_CD = spread(x_BTD)
    scale_B11 = None if adapters is None else adapters.scale_B[:, None, None].astype(dtype)
    biases = weights.biases
    hidden = []
    if weights.gate is not None:
        hidden.append(into("expert_gate", weights.gate, None if biases is None else biases.gate))
    hidden.append(into("expert_up", weights.up, None if biases is None else biases.up))
    h_CF = activation(*(x_CF[None] for x_CF in hidden))[0]
    y_SD = gathered(grouped(h_CF, weights.down, sizes_E))
    if adapters is not None and "expert_down" in adapters.pairs:
        narrow_CR = grouped(h_CF.astype(dtype), own("expert_down", "a"), sizes_En)
        narrow_BTR = gathered(narrow_CR).astype(dtype).reshape(B, T, -1) * scale_B11
        y_SD = y_SD + shared(narrow_BTR, "expert_down", "b").reshape(S, D).astype(jnp.float32)
    return y_SD


@partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False, static_argnums=0)
def clamped(
    clamp: Clamp, gate_BTF: Float[Array, "B T F"], up_BTF: Float[Array, "B T F"]
) -> Float[Array, "B T F"]:
    """Return the activation of `config.Clamp`, computed in float32 and rounded once to the inputs' dtype."""
    gate32 = jnp.minimum(gate_BTF.astype(jnp.float32), clamp.limit)
    up32 = jnp.clip(up_BTF.astype(jnp.float32), -clamp.limit, clamp.limit)
    return ((up32 + 1) * gate32 * jax.nn.sigmoid(clamp.slope * gate32)).astype(gate_BTF.dtype)


@jax.custom_vjp
def _spread(x_SD: Float[Array, "S D"], part: _Part) -> Float[Array, "C D"]:
    """Return the token of every assignment of a part.

    The gradient gathers and sums in a fixed order, where autodiff would scatter."""
    return x_SD[part.token(len(x_SD))]


def _spread_backward(kept: tuple, dy_CD: Array) -> tuple[Array, None]:
    tokens, part = kept
    alike = jnp.ones((tokens, len(part.place_A) // tokens), jnp.float32)
    return part.sum(dy_CD, alike).astype(dy_CD.dtype), None


_spread.defvjp(lambda x_SD, part: (_spread(x_SD, part), (len(x_SD), part)), _spread_backward)


@jax.custom_vjp
def _weighted_sum(
    y_CO: Float[Array, "C O"], weight_Sk: Float[Array, "S k"], part: _Part
) -> Float[Array, "S O"]:
    """Return each token's weighted sum over its assignments in a part, in float32.

    The gradient gathers too."""
    return part.sum(y_CO, weight_Sk)


def _weighted_sum_forward(y_CO: Array, weight_Sk: Array, part: _Part) -> tuple[Array, tuple]:
    return _weighted_sum(y_CO, weight_Sk, part), (y_CO, weight_Sk, part)


def _weighted_sum_backward(kept: tuple, d_SO: Array) -> tuple[Array, Array, None]:
    y_CO, weight_Sk, part = kept
    d_CO = part.real(d_SO[part.token(len(d_SO))])
    d_weight_C = (d_CO * y_CO.astype(jnp.float32)).sum(1)
    dy_CO = weight_Sk.reshape(-1)[part.order_C][:, None] * d_CO
    d_weight_Sk = part.at(d_weight_C, part.place_A.reshape(weight_Sk.shape))
    return dy_CO.astype(y_CO.dtype), d_weight_Sk, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)
