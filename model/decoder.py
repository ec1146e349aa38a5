"""The decoder: for each group of layers, a scan over the repeats of its pattern.

`build` describes it without arrays: `graph` (hashable, static in every jit) and the abstract base weights, a
plain nested dict. `trunk` is the forward pass for training. The sampler runs the same blocks one by one with
its own `mix`, so that both compute the same numbers.

The base weights, with [L, ...] leaves below "layers" (or below a key for each of several stacks, see
`config.Stack`):

    {"embed_tokens": {"weight": [V, D]},
     "layers": {"input_layernorm": {"weight"}, "q_proj": {"weight": [L, in, out], "bias": [L, out]}, ...,
                "q_norm": {"weight": [L, H]}, ...},
     "norm": {"weight": [D]},
     "lm_head": {"weight": [D, V]}}           # absent when tied

Letters: B rows, T tokens, D hidden, N query heads, K kv heads, H head dim, F ff, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from . import delta_net, mamba2, recurrent
from .config import (
    Attention,
    DeltaNet,
    Experts,
    GatedMlp,
    Latent,
    Layer,
    Mamba2,
    ModelConfig,
    Norm,
    PlainMlp,
    Recurrent,
    Site,
    Stack,
    Vector,
)
from .experts import EXPERT_SITES, Biases, Weights, mixture
from .kernels.attention import SAVED, attention
from .kernels.backends import current_backend
from .kernels.grouped_product.stacked import Stacked
from .kernels.product import Form, by_output, linear, matrix
from .kernels.two_byte_floats import restored
from .lora import LayerLora, LoraStack, delta
from .rope import Rotation, rotate, rotation
from .sharding import LogicalAxes, constrain, gathered

Base = dict[str, Any]
Mix = Callable[..., Array]
"""Combines the tokens of a layer with those before them, and may cache them.

For attention, it maps (q [B T N H], k [B T K H], v [B T K H]), with q and k already rotated, to [B T N H].
Attention with sinks passes them too, [N]. For a mixer with a state, it maps the tokens and weights that
`recurrent.mix_rows` takes to the outputs of its heads."""
Rotations = tuple[Rotation, ...]
"""The angles of each of `ModelConfig.ropes`."""

_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(*SAVED)
REMAT_POLICIES: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
    "attention": _SAVE_ATTENTION,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What is stored of a block for the backward, besides its input: the output of attention and the products
with weights ("dots"), the output of attention, or nothing ("full"). Only "full" runs attention's forward
again. ("none" stores all.)"""

_RESIDUAL: LogicalAxes = ("rows", "tokens", "hidden")


def by_vector(
    operation: Callable[[Array, Array], Array], x: Float[Array, "*batch D"], vector: Float[Array, " D"]
) -> Float[Array, "*batch D"]:
    """Apply a weight or bias to every token, in x's dtype.

    A float32 vector with a narrower x is a trained one: it is rounded to x's dtype first, and its gradient is
    summed over tokens in float32.
    """
    if vector.dtype == x.dtype:
        return operation(x, vector)
    return operation(x.astype(jnp.float32), rounded(vector, x.dtype)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded(x: Float[Array, "*N"], dtype: Any) -> Float[Array, "*N"]:
    """Round x to the precision of `dtype`, still as float32. The gradient passes unrounded."""
    return x.astype(dtype).astype(jnp.float32)


rounded.defvjp(lambda x, dtype: (rounded(x, dtype), None), lambda dtype, kept, gradient: (gradient,))


class Linear(nnx.Module):
    """x W + b, with W stored and the product computed as `form` says (`kernels.product`)."""

    def __init__(self, site: Site, dtype: Any, rngs: nnx.Rngs, form: Form):
        init = nnx.initializers.lecun_normal(batch_axis=() if site.experts is None else (0,))
        axes = site.axes if site.experts is None else ("experts", *site.axes)
        self.weight = nnx.Param(init(rngs.params(), site.shape, dtype), logical_axes=axes)
        bias = jnp.zeros((*site.shape[:-2], site.out), site.bias_dtype or dtype) if site.bias else None
        self.bias = None if bias is None else nnx.Param(bias, logical_axes=(*axes[:-2], axes[-1]))
        self.form, self.axes = form, site.axes

    @property
    def matrix(self) -> Float[Array, "I O"]:
        """W as [in, out], however it is stored."""
        return matrix(self.weight[...], self.form)

    def __call__(self, x_BTI: Float[Array, "B T I"], gather: bool = False) -> Float[Array, "B T O"]:
        """Apply it; with `gather`, W is first gathered over `fsdp` (`sharding.gathered`)."""
        weight = gathered(self.weight[...], self.axes) if gather else self.weight[...]
        y_BTO = linear(x_BTI, weight, self.form)
        return y_BTO if self.bias is None else by_vector(jnp.add, y_BTO, self.bias[...])


class Embedding(nnx.Module):
    """A table of token vectors, [V, D].

    Its values may be stored as integers (`kernels.two_byte_floats`); `bits_of` is then their dtype."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: Any, rngs: nnx.Rngs, bits_of: Any, scale: float
    ):
        self.bits_of, self.scale = bits_of, scale
        init = nnx.initializers.normal(0.02)
        table = init(rngs.params(), (vocab_size, hidden_size), dtype)
        self.weight = nnx.Param(table, logical_axes=("vocab", "embed"))

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Every device looks up its own columns, for all rows of its fsdp group. They are exchanged for whole
        # vectors of its own rows afterwards (`_RESIDUAL`): the table is not gathered.
        tokens_BT = constrain(tokens_BT, ("sequences", "tokens"))
        rows_BTD = constrain(self.weight[...][tokens_BT], ("sequences", "tokens", "embed"))
        if self.bits_of is not None:
            rows_BTD = restored(rows_BTD, self.bits_of)
        return self.scaled(rows_BTD)

    def scaled(self, rows_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return rows of the table as the layers get them."""
        return rows_BTD if self.scale == 1 else rows_BTD * jnp.asarray(self.scale, rows_BTD.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467), with float32 statistics.

    With `wide_norms`, the product with the weight is float32 too; with `centred_norms`, it is also with
    1 + weight. With `groups`, each equal part of the axis has a root mean square of its own."""

    def __init__(self, norm: Norm, config: ModelConfig, dtype: Any):
        self.centred = config.centred_norms and not norm.plain
        self.wide = self.centred or (config.wide_norms and not norm.plain)
        self.eps = config.rms_norm_eps if norm.eps is None else norm.eps
        self.groups = norm.groups
        weight = jnp.zeros if self.centred else jnp.ones
        self.weight = nnx.Param(weight((norm.size,), dtype), logical_axes=(norm.axis,))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        if self.groups > 1:
            x32 = x32.reshape(*x.shape[:-1], self.groups, -1)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1) + self.eps)
        # an einsum, so that the sum over D in its gradient is a dot: several times as fast on the CPU
        scaled = jnp.einsum("...d,...->...d", x32, inverse_rms).reshape(x.shape)
        if self.wide:
            return (scaled * (self.centred + rounded(self.weight[...], x.dtype))).astype(x.dtype)
        return by_vector(jnp.multiply, scaled.astype(x.dtype), self.weight[...])


@partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
def gated(gate_BTF: Float[Array, "B T F"], up_BTF: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """silu(gate) * up (SwiGLU, arXiv:2002.05202), computed in float32 and rounded once to the inputs' dtype.

    The backward stores the two inputs and recomputes everything in between.
    """
    gate32, up32 = gate_BTF.astype(jnp.float32), up_BTF.astype(jnp.float32)
    return (jax.nn.silu(gate32) * up32).astype(gate_BTF.dtype)


@partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
def gated_by_gelu(gate_BTF: Float[Array, "B T F"], up_BTF: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """gelu(gate) * up (GEGLU), with gelu's approximation by tanh; otherwise as `gated`."""
    gate32, up32 = gate_BTF.astype(jnp.float32), up_BTF.astype(jnp.float32)
    return (jax.nn.gelu(gate32, approximate=True) * up32).astype(gate_BTF.dtype)


_ACTIVATIONS = {"silu": gated, "gelu_tanh": gated_by_gelu}


@partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
def squared_relu(up_BTF: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """relu(up)^2 (arXiv:2109.08668), computed in float32 and rounded once to the input's dtype."""
    return jnp.square(jax.nn.relu(up_BTF.astype(jnp.float32))).astype(up_BTF.dtype)


class Values(nnx.Module):
    """The parameter of a `Vector`."""

    def __init__(self, vector: Vector, dtype: Any, rngs: nnx.Rngs):
        values = jnp.zeros(vector.shape, dtype)
        if vector.uniform is not None:
            low, high = vector.uniform
            values = jax.random.uniform(rngs.params(), vector.shape, jnp.float32, low, high).astype(dtype)
        self.weight = nnx.Param(values, logical_axes=vector.axes)


class Block(nnx.Module):
    """One layer: a mixer and an MLP, or one of them, each after a norm and added to the residual stream.

    It has a `Linear` for each site of its description, an `RMSNorm` for each norm and `Values` for each
    vector, under their names."""

    def __init__(self, config: ModelConfig, layer: Layer, dtype: Any, rngs: nnx.Rngs, form: Form):
        for site in layer.sites:
            setattr(self, site.name, Linear(site, dtype, rngs, form))
        for norm in layer.norms:
            setattr(self, norm.name, RMSNorm(norm, config, dtype))
        for vector in layer.vectors:
            setattr(self, vector.name, Values(vector, dtype, rngs))
        self.layer = layer
        self.adapters_form = Form.WIDE_SUMS if form is Form.WIDE_SUMS else Form.PLAIN
        mixer = layer.mixer
        self.rope = config.ropes.index(mixer.rope) if isinstance(mixer, Attention | Latent) else 0

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotations: Rotations,
        mix: Mix | None,
        lora: LayerLora | None = None,
        residual: LogicalAxes = _RESIDUAL,
        routes: list[Array] | None = None,
        cached: bool = False,
        replayed: Int[Array, "B T k"] | None = None,
        latents: list[Array] | None = None,
    ) -> Float[Array, "B T D"]:
        """Apply the layer to the residual stream. `mix` combines tokens with those before them; a layer
        without a mixer needs none.

        `residual` are the axes by which the stream is sharded. A mixture appends the experts that it has
        chosen, [B T k], to `routes`; `replayed` are the experts to use instead (`experts.route`). With
        `cached`, k and v are what the sampler stores of the tokens; otherwise latent attention appends that,
        [B T 1 H], to `latents` (`config.Latent`)."""

        def linear(name: str, x: Array) -> Array:
            y = getattr(self, name)(x, gather=residual == _RESIDUAL)
            return (y if lora is None else lora.add(name, x, y, self.adapters_form)).astype(x.dtype)

        after_mixer, before_mlp, after_mlp = self._norms_between()
        mixer, mlp = self.layer.mixer, self.layer.mlp
        if mixer is not None and mix is not None:
            at, y = rotations[self.rope], self.input_layernorm(x_BTD)
            y = self._mixed(mixer, y, at, mix, linear, cached, latents)
            x_BTD = constrain(x_BTD + after_mixer(y), residual)
        if mlp is None:
            return x_BTD
        y = before_mlp(x_BTD)
        if isinstance(mlp, Experts):
            y = self._mixture(mlp, y, linear, lora, routes, replayed)
        elif isinstance(mlp, PlainMlp):
            y = linear("down_proj", squared_relu(linear("up_proj", y)))
        else:
            y = self._gated_mlp(mlp, y, linear)
        return constrain(x_BTD + after_mlp(y), residual)

    def _norms_between(self) -> tuple[Callable, Callable, Callable]:
        """Return what the mixer's output, the MLP's input and the MLP's output go through."""
        if self.layer.sandwich:
            return (
                self.post_attention_layernorm,
                self.pre_feedforward_layernorm,
                self.post_feedforward_layernorm,
            )
        if self.layer.mixer is None:
            return _unchanged, self.input_layernorm, _unchanged
        return _unchanged, getattr(self, "post_attention_layernorm", _unchanged), _unchanged

    def _mixed(
        self,
        mixer: Attention | Latent | Recurrent,
        y_BTD: Array,
        at: Rotation,
        mix: Mix,
        linear: Callable,
        cached: bool,
        latents: list[Array] | None,
    ) -> Float[Array, "B T D"]:
        """Return the output of the mixer."""
        if isinstance(mixer, Latent):
            mixed = self._latent(mixer, y_BTD, at, mix, linear, cached, latents)
        elif isinstance(mixer, DeltaNet):
            mixed = self._delta_net(mixer, y_BTD, mix, linear)
        elif isinstance(mixer, Mamba2):
            mixed = self._mamba2(mixer, y_BTD, mix, linear)
        else:
            mixed = self._attention(mixer, y_BTD, at, mix, linear)
        return linear(mixer.sites[-1].name, mixed.reshape(*y_BTD.shape[:2], -1))

    def _gated_mlp(self, mlp: GatedMlp, y_BTD: Array, linear: Callable) -> Float[Array, "B T D"]:
        if mlp.fused:
            gate, up = jnp.split(linear("gate_up_proj", y_BTD), 2, axis=-1)
        else:
            gate, up = linear("gate_proj", y_BTD), linear("up_proj", y_BTD)
        return linear("down_proj", _ACTIVATIONS[mlp.activation](gate, up))

    def _mixture(
        self,
        mlp: Experts,
        y_BTD: Array,
        linear: Callable,
        lora: LayerLora | None,
        routes: list[Array] | None,
        replayed: Array | None,
    ) -> Float[Array, "B T D"]:
        """Return the output of a mixture of experts, with that of the MLP that all tokens share."""
        activation = squared_relu if mlp.plain else gated
        latent = None if mlp.latent is None else linear("fc1_latent_proj", y_BTD)
        mixed, chosen_BTk = mixture(mlp, self._expert_weights(mlp), y_BTD, lora, activation, replayed, latent)
        if mlp.latent is not None:
            mixed = linear("fc2_latent_proj", mixed)
        if mlp.shared:
            names = ("shared_up",) if mlp.plain else ("shared_gate", "shared_up")
            shared = linear("shared_down", activation(*(linear(name, y_BTD) for name in names)))
            if mlp.shared_gated:
                shared = shared * jax.nn.sigmoid(linear("shared_expert_gate", y_BTD))
            mixed += shared
        if routes is not None:
            routes.append(chosen_BTk)
        return mixed

    def _attention(
        self, mixer: Attention, y_BTD: Array, at: Rotation, mix: Mix, linear: Callable
    ) -> Float[Array, "B T N H"]:
        B, T, _ = y_BTD.shape
        if mixer.fused:
            heads = linear("qkv_proj", y_BTD).reshape(B, T, -1, mixer.head_dim)
            q, k, v = jnp.split(heads, (mixer.heads, mixer.heads + mixer.kv_heads), axis=2)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            q, k, v = (linear(name, y_BTD).reshape(B, T, -1, mixer.head_dim) for name in names)
        if mixer.gated:
            q, gate = jnp.split(q.reshape(B, T, mixer.heads, -1), 2, axis=-1)
        if mixer.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        sinks = (self.sinks.weight[...],) if mixer.sinks else ()
        mixed = mix(rotate(q, at), rotate(k, at), v, *sinks)
        return mixed * jax.nn.sigmoid(gate) if mixer.gated else mixed

    def _latent(
        self,
        mixer: Latent,
        y_BTD: Array,
        at: Rotation,
        mix: Mix,
        linear: Callable,
        cached: bool,
        latents: list[Array] | None,
    ) -> Float[Array, "B T N V"]:
        """Return the heads' outputs of latent attention, from expanded or from `cached` keys and values.

        With c the latent of a token, and Wk and Wv a head's parts of the matrix that expands it, the plain
        part of a score is q (c Wk) = (q Wk^T) c, and a head's output is sum p (c Wv) = (sum p c) Wv."""
        (B, T, _), N, R = y_BTD.shape, mixer.heads, mixer.kv_rank
        if mixer.query_rank is None:
            q_BTNH = linear("q_proj", y_BTD)
        else:
            q_BTNH = linear("q_b_proj", self.q_a_layernorm(linear("q_a_proj", y_BTD)))
        q_BTNH = q_BTNH.reshape(B, T, N, mixer.key_dim)
        q_plain, q_rope = jnp.split(q_BTNH, (mixer.plain_dim,), axis=-1)
        c_BTR, k_rope = jnp.split(linear("kv_a_proj_with_mqa", y_BTD), (R,), axis=-1)
        c_BTR = self.kv_a_layernorm(c_BTR)
        interleaved = mixer.rope.interleaved
        q_rope, k_rope = (rotate(x, at, interleaved) for x in (q_rope, k_rope[:, :, None]))
        stored_BT1H = jnp.concatenate([c_BTR[:, :, None], k_rope], axis=-1)

        if not cached:
            if latents is not None:
                latents.append(stored_BT1H)
            kv_BTNH = linear("kv_b_proj", c_BTR).reshape(B, T, N, -1)
            k_plain, v = jnp.split(kv_BTNH, (mixer.plain_dim,), axis=-1)
            k_rope = jnp.broadcast_to(k_rope, (B, T, N, mixer.rope_dim))
            q, k = (jnp.concatenate(x, axis=-1) for x in ((q_plain, q_rope), (k_plain, k_rope)))
            # The kernels take heads of one size.
            H = max(mixer.key_dim, mixer.value_dim)
            q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, H - x.shape[-1]),)) for x in (q, k, v))
            return mix(q, k, v)[..., : mixer.value_dim]
        expand_RNH = self.kv_b_proj.matrix.reshape(R, N, -1)
        Wk, Wv = jnp.split(expand_RNH.astype(y_BTD.dtype), (mixer.plain_dim,), axis=-1)
        q = jnp.concatenate([jnp.einsum("btnh,rnh->btnr", q_plain, Wk), q_rope], axis=-1)
        mixed_BTNR = mix(q, stored_BT1H, stored_BT1H)[..., :R].astype(y_BTD.dtype)
        return jnp.einsum("btnr,rnv->btnv", mixed_BTNR, Wv)

    def _delta_net(
        self, mixer: DeltaNet, y_BTD: Array, mix: Mix, linear: Callable
    ) -> Float[Array, "B T H V"]:
        B, T, _ = y_BTD.shape
        qkv_BTC = jnp.concatenate([linear(f"in_proj_{name}", y_BTD) for name in "qkv"], axis=-1)
        z_BTHV = linear("in_proj_z", y_BTD).reshape(B, T, mixer.value_heads, -1)
        a, b = linear("in_proj_a", y_BTD), linear("in_proj_b", y_BTD)
        of = delta_net.tokens(mixer, qkv_BTC, a, b, self.A_log.weight[...], self.dt_bias.weight[...])
        mixed = self.delta_norm(mix(of, self.conv1d.weight[...]).reshape(z_BTHV.shape))
        return (mixed.astype(jnp.float32) * jax.nn.silu(z_BTHV.astype(jnp.float32))).astype(y_BTD.dtype)

    def _mamba2(self, mixer: Mamba2, y_BTD: Array, mix: Mix, linear: Callable) -> Float[Array, "B T width"]:
        z_BTW, x, b, c, dt = (linear(f"{name}_proj", y_BTD) for name in ("gate", "x", "b", "c", "dt"))
        xbc_BTC = jnp.concatenate([x, b, c], axis=-1)
        of = mamba2.tokens(mixer, xbc_BTC, dt, self.A_log.weight[...], self.dt_bias.weight[...])
        bias = self.conv1d_bias.weight[...] if mixer.conv_biased else None
        weights = mamba2.Weights(self.conv1d.weight[...], bias, self.D.weight[...])
        mixed = mix(of, weights).reshape(z_BTW.shape) * jax.nn.silu(z_BTW.astype(jnp.float32))
        return self.mamba_norm(mixed).astype(y_BTD.dtype)

    def _expert_weights(self, mlp: Experts) -> Weights:
        bias = None if self.router.bias is None else self.router.bias[...]
        gate = None if mlp.plain else self.expert_gate.weight.get_value()
        up, down = (site.weight.get_value() for site in (self.expert_up, self.expert_down))
        biases = None
        if mlp.biased:
            biases = Biases(*(getattr(self, name).bias[...] for name in EXPERT_SITES))
        return Weights(self.router.matrix, gate, up, down, bias, biases)


def _unchanged(x: Array) -> Array:
    return x


class Stacks(nnx.Module):
    """The stacks of a decoder with several, as attributes under their keys."""

    def __init__(self, stacks: dict[str, Block]):
        for key, blocks in stacks.items():
            setattr(self, key, blocks)


class Decoder(nnx.Module):
    """Embedding, stacks of blocks, final norm, and a separate head if not tied."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: Any,
        rngs: nnx.Rngs,
        form: Form = Form.PLAIN,
        bits_of: Any = None,
    ):
        """`form` is that of all products, and `bits_of` is `Embedding`'s."""
        V, D = config.vocab_size, config.hidden_size
        head = Site("lm_head", D, V, None, ("embed", "vocab"))
        self.embed_tokens = Embedding(V, D, dtype, rngs, bits_of, config.embedding_scale)

        def blocks(stack: Stack) -> Block:
            keys = rngs.split(len(stack.layers))
            return nnx.vmap(lambda keys: Block(config, stack.layer, dtype, keys, form))(keys)

        (alone, *more) = config.all_stacks
        self.layers = Stacks({str(s.key): blocks(s) for s in config.all_stacks}) if more else blocks(alone)
        self.norm = RMSNorm(Norm("norm", D), config, dtype)
        self.lm_head = None if config.tie_embeddings else Linear(head, dtype, rngs, form)
        self.config = config

    def stack(self, stack: Stack) -> Block:
        """Return the blocks of a stack; their parameters have a leading axis."""
        return self.layers if stack.key is None else getattr(self.layers, stack.key)

    def rotations(self, position_BT: Int[Array, "B T"]) -> Rotations:
        """Return the rope angles that `Block` takes."""
        return tuple(rotation(rope, position_BT) for rope in self.config.ropes)


def build(
    config: ModelConfig, dtype: Any, form: Form = Form.PLAIN, bits_of: Any = None
) -> tuple[nnx.GraphDef, Base]:
    """Describe the decoder without making arrays. Returns (graph, abstract base of ShapeDtypeStructs).

    `form` is how it multiplies with its matrices. With `bits_of`, a two-byte float dtype, the embedding is
    stored as integers with the same bits.

    `graph` is hashable and equal for equal configs: pass it as a static argument of jit, and inside it
    `nnx.merge(graph, base)` gives the `Decoder`.
    """
    graph, state = nnx.split(_abstract(config, dtype, form, bits_of))
    return graph, nnx.to_pure_dict(state)


def logical_axes(config: ModelConfig) -> Base:
    """Return the base's tree with a tuple of logical axis names (`sharding.RULES`) at each leaf."""
    _, state = nnx.split(_abstract(config, jnp.float32))

    def axes(path: tuple, variable: nnx.Variable) -> LogicalAxes:
        stacked = ("layers",) if path[0].key == "layers" else ()
        return stacked + variable.get_metadata("logical_axes")

    named = jax.tree_util.tree_map_with_path(axes, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(named)


def random_base(config: ModelConfig, dtype: Any, seed: int = 0) -> Base:
    """Return random weights, for tests and benchmarks of shapes without trained weights."""

    def make(key: Array) -> Base:
        return nnx.to_pure_dict(nnx.split(Decoder(config, dtype, nnx.Rngs(key)))[1])

    return jax.jit(make)(jax.random.key(seed))


def _abstract(config: ModelConfig, dtype: Any, form: Form = Form.PLAIN, bits_of: Any = None) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, dtype, nnx.Rngs(0), form, bits_of))


def trunk(
    graph: nnx.GraphDef,
    base: Base,
    tokens_BT: Int[Array, "B T"],
    position_BT: Int[Array, "B T"],
    start_BT: Int[Array, "B T"],
    lora: LoraStack | None = None,
    row_adapter_B: Int[Array, " B"] | None = None,
    remat: str = "none",
) -> Float[Array, "B T D"]:
    """Return the hidden states after the final norm, in the dtype of the base's linears.

    Differentiable in `lora` and in `base`, whose embedding, norms and biases may be float32 beside narrower
    linears. `position_BT` counts from the start of each token's own sequence. `start_BT` is the first key in
    the row that token t sees (`attention`); padding may point at itself. The sliding window is applied here.
    `lora` is `lora.stack_adapters`' result and `row_adapter_B` each row's index in it (ignored for one
    adapter). `remat`: "none", "dots", "attention" or "full", see REMAT_POLICIES.
    """
    real_BT = jnp.zeros(tokens_BT.shape, bool)
    return routed_trunk(graph, base, tokens_BT, position_BT, start_BT, real_BT, lora, row_adapter_B, remat)[0]


def routed_trunk(
    graph: nnx.GraphDef,
    base: Base,
    tokens_BT: Int[Array, "B T"],
    position_BT: Int[Array, "B T"],
    start_BT: Int[Array, "B T"],
    real_BT: Bool[Array, "B T"],
    lora: LoraStack | None = None,
    row_adapter_B: Int[Array, " B"] | None = None,
    remat: str = "none",
    replayed_BTMk: Int[Array, "B T M k"] | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, "M B E"] | None]:
    """Return `trunk`'s hidden states, and how many of each row's `real` tokens each expert got.

    The counts have an axis of the layers with experts; they are None if there are no such layers. `replayed`
    are the experts to use in these layers (`experts.route`)."""
    model = nnx.merge(graph, base)
    config = model.config
    rotations = model.rotations(position_BT)

    mixtures = [*config.mixtures]
    numbers = [mixtures.index(n) if n in config.mixtures else -1 for n in range(config.num_layers)]

    def run(block: Block, x_BTD: Array, pairs: dict, number: Array | None) -> tuple[Array, dict[str, Array]]:
        mlp = block.layer.mlp
        routes: list[Array] = []
        replayed_BTk = None
        if replayed_BTMk is not None and isinstance(mlp, Experts):
            replayed_BTk = replayed_BTMk[:, :, number]

        block_lora = None if lora is None else LayerLora(pairs, lora["scale"], row_adapter_B)
        mix = _mix_in_rows(block.layer.mixer, start_BT)
        x_BTD = block(x_BTD, rotations, mix, block_lora, routes=routes, replayed=replayed_BTk)
        if not isinstance(mlp, Experts):
            return x_BTD, {}
        return x_BTD, {"tokens_by_expert": _tokens_by_expert(mlp.count, routes[0], real_BT)}

    # Rounded after the look-up, so that the gradient of a float32 table is summed over tokens in float32.
    first = config.all_stacks[0]
    dtype = getattr(model.stack(first), first.layer.sites[0].name).weight[...].dtype
    if dtype == jnp.uint16:  # two-byte floats stored as integers
        dtype = model.norm.weight.dtype
    x_BTD = constrain(model.embed_tokens(tokens_BT).astype(dtype), _RESIDUAL)
    x_BTD, kept = scan_layers(
        model, lora, x_BTD, run, remat=remat, numbers=None if replayed_BTMk is None else numbers
    )
    return model.norm(x_BTD), kept.get("tokens_by_expert")


def _mix_in_rows(mixer: Attention | Latent | Recurrent | None, start_BT: Array) -> Mix | None:
    """Return a `Mix` of the tokens of packed rows, with those of their own segments."""
    if mixer is None:
        return None
    if isinstance(mixer, Recurrent):
        return lambda tokens, weights: recurrent.mix_rows(mixer, tokens, weights, start_BT)

    def attend(q: Array, k: Array, v: Array, sinks: Array | None = None) -> Array:
        return attention(q, k, v, start_BT, mixer.scale, window=mixer.window, sinks_N=sinks)

    return attend


def _tokens_by_expert(
    experts: int, chosen_BTk: Int[Array, "B T k"], real_BT: Bool[Array, "B T"]
) -> Int[Array, "B E"]:
    rows_B11 = jnp.arange(len(real_BT))[:, None, None]
    counts_BE = jnp.zeros((len(real_BT), experts), jnp.int32)
    return counts_BE.at[rows_B11, chosen_BTk].add(real_BT[..., None])


def scan_layers(
    model: Decoder,
    lora: LoraStack | None,
    x_BTD: Any,
    run: Callable[[Block, Any, dict, Any], tuple[Any, dict[Any, Any]]],
    *,
    numbers: Sequence[int] | None = None,
    remat: str = "none",
) -> tuple[Any, dict[Any, Any]]:
    """Pass the residual stream [B T D] through all layers, in one scan per group.

    `run(block, x, pairs, number)` applies a layer with its adapter pairs, and returns the stream and what to
    keep, by key; `number` is the layer's in `numbers`, which has one for each layer of the decoder. Returns
    the stream, and what was kept by key, with a leading axis of the layers that kept something under it.
    `remat` is what the backward stores of each layer (REMAT_POLICIES). The stream may be a tree that holds
    more than the hidden states, such as the pages of keys and values.
    """

    def apply(
        graph: nnx.GraphDef, x_BTD: Any, whole: Base, weights: Base, at: Array, pairs: dict, number: Any
    ) -> tuple[Any, Any]:
        weights = jax.tree.map(lambda w: restored(w, dtype) if w.dtype == jnp.uint16 else w, weights)
        experts = {name: weights[name] | {"weight": _of_layer(w, at)} for name, w in whole.items()}
        return run(nnx.merge(graph, weights | experts), x_BTD, pairs, number)

    if remat != "none":
        apply = jax.checkpoint(apply, policy=REMAT_POLICIES[remat], prevent_cse=False, static_argnums=0)
    kept: dict[Any, list[Any]] = {}
    is_frozen = lora is not None
    dtype = model.norm.weight.dtype
    for stacks in model.config.stacks:
        graphs, states = zip(*(nnx.split(model.stack(stack)) for stack in stacks), strict=True)
        weights = [nnx.to_pure_dict(state) for state in states]
        whole = [_whole_experts(each) if is_frozen else {} for each in weights]
        pairs = [{} if lora is None else stack.of(lora["layers"]) for stack in stacks]
        of_stacks = [None if numbers is None else _numbers(numbers, stack) for stack in stacks]

        def step(x_BTD: Any, layers: list, graphs: tuple = graphs, whole: list = whole) -> tuple[Any, list]:
            kept = []
            for graph, of_all, layer in zip(graphs, whole, layers, strict=True):
                x_BTD, of_layer = apply(graph, x_BTD, of_all, *layer)
                kept.append(of_layer)
            return x_BTD, kept

        places = [jnp.arange(len(stack.layers)) for stack in stacks]
        each = list(zip(weights, places, pairs, of_stacks, strict=True))
        x_BTD, of_pattern = jax.lax.scan(step, x_BTD, each)
        for key in dict.fromkeys(key for of_stack in of_pattern for key in of_stack):
            kept.setdefault(key, []).append(_in_order([each[key] for each in of_pattern if key in each]))
    return x_BTD, {
        key: groups[0] if len(groups) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *groups)
        for key, groups in kept.items()
    }


def _whole_experts(weights: Base) -> Base:
    """Take the matrices of experts, [L E I O], out of a stack's weights on one CPU device.

    There each expert's matrix is read in place, while a scan over the layers would first copy those of all
    experts of each layer. It is for frozen weights only: a gradient would have all layers in every step."""
    mesh = jax.sharding.get_abstract_mesh()
    if current_backend() != "cpu" or not (mesh.empty or mesh.size == 1):
        return {}
    return {name: weights[name].pop("weight") for name in EXPERT_SITES if name in weights}


def _of_layer(w_LEIO: Float[Array, "L E I O"], layer: Int[Array, ""]) -> Stacked:
    return Stacked(w_LEIO.reshape(-1, *w_LEIO.shape[2:]), layer * w_LEIO.shape[1])


def _numbers(of_all: Sequence[int], stack: Stack) -> Int[Array, " L"]:
    return jnp.asarray([of_all[layer] for layer in stack.layers])


def _in_order(of_stacks: list[Any]) -> Any:
    """Interleave what the stacks of a group kept, [repeats, ...] each, to [layers, ...]."""
    if len(of_stacks) == 1:
        return of_stacks[0]
    return jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *of_stacks)


def unembed(base: Base) -> Float[Array, "V D"]:
    """Return the head as [V, D]: the embedding if tied, else lm_head transposed (XLA folds that in)."""
    if "lm_head" in base:
        return base["lm_head"]["weight"].T
    return base["embed_tokens"]["weight"]


def logits(
    head_VD: Float[Array, "V D"],
    lora: LoraStack | None,
    hidden_BTD: Float[Array, "B T D"],
    row_adapter_B: Int[Array, " B"] | None,
    each_once: bool = False,
) -> Float[Array, "B T V"]:
    """Return float32 logits, including the head's adapter if there is one. `each_once` is `lora.delta`'s."""
    z = by_output(hidden_BTD, head_VD)
    if lora is not None and "unembed" in lora:
        hidden32_BTD = hidden_BTD.astype(jnp.float32)
        z = z + delta(hidden32_BTD, lora["unembed"], lora["scale"], row_adapter_B, each_once)
    return z
