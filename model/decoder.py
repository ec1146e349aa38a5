"""The decoder: a scanned stack of identical blocks.

`build` describes it without arrays: `graph` (hashable, static in every jit) and the abstract base weights, a
plain nested dict. `trunk` is the forward pass for training. The sampler runs the same blocks one by one with
its own `attend`, so that both compute the same numbers.

The base weights, with [L, ...] leaves below "layers":

    {"embed_tokens": {"weight": [V, D]},
     "layers": {"input_layernorm": {"weight"}, "q_proj": {"weight": [L, in, out], "bias": [L, out]}, ...,
                "q_norm": {"weight": [L, H]}, ...},
     "norm": {"weight": [D]},
     "lm_head": {"weight": [D, V]}}           # absent when tied

Letters: B rows, T tokens, D hidden, N query heads, K kv heads, H head dim, F ff, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .config import ModelConfig
from .kernels.attention import SAVED, attention
from .lora import LayerLora, LoraStack, delta
from .rope import Rotation, rotate, rotation
from .sharding import LogicalAxes, constrain

Base = dict[str, Any]
Attend = Callable[[Array, Array, Array], Array]
"""Maps (q [B T N H], k [B T K H], v [B T K H]), with q and k already rotated, to [B T N H]."""

_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(*SAVED)
REMAT_POLICIES: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
    "full": _SAVE_ATTENTION,
}
"""What is stored of a block for the backward, besides its input: the output of attention, and with "dots" the
products with weights too. ("none" stores all.)"""

_RESIDUAL: LogicalAxes = ("rows", "tokens", "hidden")
_LINEAR_AXES: dict[str, LogicalAxes] = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "ff"),
    "up_proj": ("embed", "ff"),
    "down_proj": ("ff", "embed"),
}


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
    """x W + b in x's dtype, with W [in, out].

    With `by_output`, W is stored as [out, in] and sums are float32."""

    by_output = False

    def __init__(self, into: int, out: int, axes: LogicalAxes, bias: bool, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.weight = nnx.Param(init(rngs.params(), (into, out), dtype), logical_axes=axes)
        self.bias = nnx.Param(jnp.zeros((out,), dtype), logical_axes=axes[1:]) if bias else None

    def __call__(self, x_BTI: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        weight = self.weight[...]
        y_BTO = product_by_output(x_BTI, weight) if self.by_output else x_BTI @ weight
        return y_BTO if self.bias is None else by_vector(jnp.add, y_BTO, self.bias[...])


def product_by_output(x_BTI: Float[Array, "B T I"], w_OI: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    """Return x W^T for a few rows, computed in W's dtype and summed in float32."""
    B, T, into = x_BTI.shape
    rows = x_BTI.reshape(B * T, into).astype(w_OI.dtype)
    if B * T == 1 and w_OI.dtype != jnp.float32:
        rows = jnp.repeat(rows, 2, axis=0)  # for a single row, the CPU backend would convert all of W
    y_RO = jnp.einsum("ri,oi->ro", rows, w_OI, preferred_element_type=jnp.float32)
    return y_RO[: B * T].reshape(B, T, -1)


class Embedding(nnx.Module):
    """A table of token vectors, [V, D].

    Two-byte floats may be stored as integers with the same bits; `bits_of` is then their dtype. Otherwise the
    CPU backend would convert the whole table to float32 to read a few bfloat16 rows."""

    bits_of: Any = None

    def __init__(self, vocab_size: int, hidden_size: int, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        table = init(rngs.params(), (vocab_size, hidden_size), dtype)
        self.weight = nnx.Param(table, logical_axes=("vocab", "embed"))

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # gathered over fsdp first: the batch's rows and the table's columns cannot share that mesh axis
        rows_BTD = constrain(self.weight[...], ("vocab", "hidden"))[tokens_BT]
        return rows_BTD if self.bits_of is None else jax.lax.bitcast_convert_type(rows_BTD, self.bits_of)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467), with float32 statistics."""

    def __init__(self, size: int, axis: str, eps: float, dtype: Any):
        self.weight = nnx.Param(jnp.ones((size,), dtype), logical_axes=(axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1) + self.eps)
        # an einsum, so that the sum over D in its gradient is a dot: several times as fast on the CPU
        scaled = jnp.einsum("...d,...->...d", x32, inverse_rms)
        return by_vector(jnp.multiply, scaled.astype(x.dtype), self.weight[...])


@partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
def gated(gate_BTF: Float[Array, "B T F"], up_BTF: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """silu(gate) * up (SwiGLU, arXiv:2002.05202), computed in float32 and rounded once to the inputs' dtype.

    The backward stores the two inputs and recomputes everything in between.
    """
    gate32, up32 = gate_BTF.astype(jnp.float32), up_BTF.astype(jnp.float32)
    return (jax.nn.silu(gate32) * up32).astype(gate_BTF.dtype)


class Block(nnx.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs):
        for name, (into, out) in config.linears.items():
            setattr(self, name, Linear(into, out, _LINEAR_AXES[name], name in config.biased, dtype, rngs))
        D, H, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, "hidden", eps, dtype)
        self.post_attention_layernorm = RMSNorm(D, "hidden", eps, dtype)
        self.q_norm = RMSNorm(H, "head_dim", eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(H, "head_dim", eps, dtype) if config.qk_norm else None
        self.head_dim = H

    def __call__(
        self, x_BTD: Float[Array, "B T D"], at: Rotation, attend: Attend, lora: LayerLora | None = None
    ) -> Float[Array, "B T D"]:
        """Apply one layer to the residual stream. `attend` gets rotated q and k, and may cache k and v."""
        B, T, _ = x_BTD.shape

        def linear(name: str, x: Array) -> Array:
            y = getattr(self, name)(x)
            return (y if lora is None else lora.add(name, x, y)).astype(x.dtype)

        y = self.input_layernorm(x_BTD)
        q, k, v = (linear(n, y).reshape(B, T, -1, self.head_dim) for n in ("q_proj", "k_proj", "v_proj"))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed_BTNH = attend(rotate(q, at), rotate(k, at), v)
        x_BTD = constrain(x_BTD + linear("o_proj", mixed_BTNH.reshape(B, T, -1)), _RESIDUAL)
        y = self.post_attention_layernorm(x_BTD)
        y_BTF = gated(linear("gate_proj", y), linear("up_proj", y))
        return constrain(x_BTD + linear("down_proj", y_BTF), _RESIDUAL)


class Decoder(nnx.Module):
    """Embedding, blocks stacked on a leading axis, final norm, and a separate head if not tied."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(V, D, dtype, rngs)
        self.layers = nnx.vmap(lambda keys: Block(config, dtype, keys))(rngs.split(config.num_layers))
        self.norm = RMSNorm(D, "hidden", config.rms_norm_eps, dtype)
        self.lm_head = None if config.tie_embeddings else Linear(D, V, ("embed", "vocab"), False, dtype, rngs)
        self.config = config

    def block(self, layer: int | Array) -> Block:
        """Return layer number `layer` (traced or not) as a single block."""
        graph, stacked = nnx.split(self.layers)
        return nnx.merge(graph, jax.tree.map(lambda w: w[layer], stacked))

    def rotation(self, position_BT: Int[Array, "B T"]) -> Rotation:
        """Return the rope angles that `Block` takes."""
        return rotation(self.config, position_BT)


def build(config: ModelConfig, dtype: Any) -> tuple[nnx.GraphDef, Base]:
    """Describe the decoder without making arrays. Returns (graph, abstract base of ShapeDtypeStructs).

    `graph` is hashable and equal for equal configs: pass it as a static argument of jit, and inside it
    `nnx.merge(graph, base)` gives the `Decoder`.
    """
    graph, state = nnx.split(_abstract(config, dtype))
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


def _abstract(config: ModelConfig, dtype: Any) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, dtype, nnx.Rngs(0)))


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
    adapter). `remat`: "none", "dots" or "full", see REMAT_POLICIES.
    """
    model = nnx.merge(graph, base)
    config = model.config
    at = model.rotation(position_BT)
    block_graph, stacked = nnx.split(model.layers)

    def step(x_BTD: Array, layer: tuple) -> tuple[Array, None]:
        weights, pairs, windowed = layer

        def attend(q: Array, k: Array, v: Array) -> Array:
            return attention(
                q, k, v, start_BT, config.head_dim**-0.5, window=config.sliding_window, windowed=windowed
            )

        block_lora = None if lora is None else LayerLora(pairs, lora["scale"], row_adapter_B)
        return nnx.merge(block_graph, weights)(x_BTD, at, attend, block_lora), None

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    # Rounded after the look-up, so that the gradient of a float32 table is summed over tokens in float32.
    dtype = model.layers.o_proj.weight[...].dtype
    x_BTD = constrain(model.embed_tokens(tokens_BT).astype(dtype), _RESIDUAL)
    layers = (stacked, {} if lora is None else lora["layers"], windowed_by_layer(config))
    x_BTD, _ = jax.lax.scan(step, x_BTD, layers)
    return model.norm(x_BTD)


def windowed_by_layer(config: ModelConfig) -> Bool[Array, " L"] | None:
    """Return whether each layer has the sliding window, to scan over; None if all layers are alike."""
    return None if config.windowed_layers is None else jnp.array(config.windowed_layers)


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
) -> Float[Array, "B T V"]:
    """Return float32 logits, including the head's adapter if there is one."""
    z = product_by_output(hidden_BTD, head_VD)
    if lora is not None and "unembed" in lora:
        z = z + delta(hidden_BTD.astype(jnp.float32), lora["unembed"], lora["scale"], row_adapter_B)
    return z
