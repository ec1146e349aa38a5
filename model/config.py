"""The shape of a decoder, as `folder` reads it from a Hugging Face folder. Imports no array library.

A decoder is data: groups of a repeated pattern of layers. A layer is a mixer (attention, a delta net or a
Mamba-2) and an MLP, or one of them, each a frozen description of its sizes and options. A description lists
its matrices as sites. The base's parameters, adapters, the names in files, merging, sharding and parameter
counts all follow from the sites.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple


class UnsupportedModelError(ValueError):
    """The folder does not hold a supported model; the message says why."""


class Site(NamedTuple):
    """A matrix of a layer that is multiplied with activations, [into, out].

    `part` is the switch of a client that trains it with LoRA (`train_attn`, `train_mlp`); None is never
    trained. `axes` are the logical axes of its sides (`sharding.RULES`). If there are `experts`, each of them
    has such a matrix. Their adapter has one factor that is `shared` by all experts, the one at the hidden
    axis, and one of its own for each. SGLang and vLLM merge the matrices of a layer that have the same
    `merged` into one, so these have to be treated alike. `bias_dtype` is the bias's if it is not the model's.
    The adapter of experts is called `numbered` in files: w1, w2 or w3.
    """

    name: str
    into: int
    out: int
    part: Literal["attn", "mlp"] | None
    axes: tuple[str, str]
    bias: bool = False
    experts: int | None = None
    shared: Literal["a", "b"] | None = None
    merged: str | None = None
    bias_dtype: Literal["float32"] | None = None
    numbered: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape in one layer."""
        sides = (self.into, self.out)
        return sides if self.experts is None else (self.experts, *sides)

    def factors(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the two factors of its adapter in one layer."""
        sides: dict[str, tuple[int, ...]] = {"a": (self.into, rank), "b": (rank, self.out)}
        if self.experts is None:
            return sides
        own = "b" if self.shared == "a" else "a"
        return sides | {own: (self.experts, *sides[own])}


class Norm(NamedTuple):
    """An RMSNorm over vectors of `size` numbers, with the logical axis of its weight.

    `eps` is the model's if it is None. A `plain` one multiplies with its weight whatever `ModelConfig` says
    of the others. The vectors have `groups` equal parts, each of which is normed by itself."""

    name: str
    size: int
    axis: str = "hidden"
    eps: float | None = None
    plain: bool = False
    groups: int = 1


class Vector(NamedTuple):
    """Another parameter of a layer: its name, its shape and the logical axes of that.

    It begins with zeros, or with values from `uniform[0]` to `uniform[1]`."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    uniform: tuple[float, float] | None = None


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of rotary frequencies for contexts longer than those of pre-training.

    `llama3`: low frequencies are divided by `factor`, high ones are unchanged, with a linear blend in between
    (Llama 3.1's rule). `linear`: all frequencies are divided by `factor`. `yarn` (arXiv:2309.00071):
    frequencies that turn fewer than `beta_slow` times in the original context are divided by `factor`, those
    that turn more than `beta_fast` times are unchanged, with a linear blend in between. Cosine and sine are
    multiplied by `attention_factor`. With `truncate`, the blend begins and ends at whole dimensions.
    `longrope` (arXiv:2402.13753): frequency i is divided by `factors[i]`, with the same `attention_factor`.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of `dims` dimensions of a head, with frequencies theta^(-2i/dims).

    The pairs that turn together are the numbers i and i + dims/2, or 2i and 2i + 1 if `interleaved`. Heads
    without a rotary embedding have one of 0 dims."""

    theta: float
    dims: int
    scaling: RopeScaling | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class KeysValues:
    """The sampler's cache of every token for a layer: a key and a value of each of `heads` heads.

    With `value_in_key`, the value is the first numbers of the key and is not stored again."""

    heads: int
    key_dim: int
    value_dim: int
    value_in_key: bool = False

    @property
    def per_token(self) -> int:
        """The numbers cached of one token."""
        return self.heads * (self.key_dim + (0 if self.value_in_key else self.value_dim))

    @property
    def stored_dims(self) -> tuple[int, ...]:
        """The sizes of the vectors that are stored for each head: a key, and a value of its own if any."""
        return (self.key_dim,) if self.value_in_key else (self.key_dim, self.value_dim)


@dataclass(frozen=True)
class Attention:
    """Attention with grouped heads. `kv_heads` divides `heads`.

    With `gated`, q_proj gives each head a query and then a gate, and sigmoid(gate) multiplies its output.

    `window` is the most keys that a query sees, including its own. `biased` names the matrices with biases.
    With `qk_norm`, each head of q and k goes through an RMSNorm before rope. With `sinks`, every head has a
    learned logit that takes part in the softmax and has no value. With `fused`, q, k and v are one matrix,
    side by side, and have one adapter together.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    window: int | None = None
    biased: tuple[str, ...] = ()
    qk_norm: bool = False
    sinks: bool = False
    fused: bool = False
    gated: bool = False
    score_scale: float | None = None

    @property
    def scale(self) -> float:
        """The factor of scores: head_dim^-1/2 if `score_scale` is None."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    @property
    def cached(self) -> KeysValues:
        return KeysValues(self.kv_heads, self.head_dim, self.head_dim)

    @property
    def width(self) -> int:
        """The numbers in the outputs of all heads of a token."""
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        """The numbers in the queries, keys and values of a token."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def sites(self) -> tuple[Site, ...]:
        D, Q, K = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.fused:
            return (
                Site("qkv_proj", D, Q + 2 * K, "attn", ("embed", "heads")),
                Site("o_proj", Q, D, "attn", ("summed_heads", "hidden")),
            )
        return (
            Site(
                "q_proj",
                D,
                (1 + self.gated) * Q,
                "attn",
                ("embed", "heads"),
                "q_proj" in self.biased,
                merged="qkv",
            ),
            Site("k_proj", D, K, "attn", ("embed", "kv_heads"), "k_proj" in self.biased, merged="qkv"),
            Site("v_proj", D, K, "attn", ("embed", "kv_heads"), "v_proj" in self.biased, merged="qkv"),
            Site("o_proj", Q, D, "attn", ("summed_heads", "hidden"), "o_proj" in self.biased),
        )

    @property
    def norms(self) -> tuple[Norm, ...]:
        if not self.qk_norm:
            return ()
        return Norm("q_norm", self.head_dim, "head_dim"), Norm("k_norm", self.head_dim, "head_dim")

    @property
    def vectors(self) -> tuple[Vector, ...]:
        return (Vector("sinks", (self.heads,), ("heads",)),) if self.sinks else ()


@dataclass(frozen=True)
class States:
    """The sampler's state of every sequence for a layer, in float32: a matrix for each head, and the last
    inputs of a convolution, [tokens, channels]."""

    matrix: tuple[int, ...]
    tail: tuple[int, int]

    @property
    def per_token(self) -> int:
        return 0

    @property
    def per_sequence(self) -> int:
        """The numbers kept of one sequence."""
        return prod(self.matrix) + prod(self.tail)


CacheKind = KeysValues | States


@dataclass(frozen=True)
class DeltaNet:
    """A gated delta net (`delta_net`). `key_heads` divides `value_heads`; the heads of queries are those of
    keys. The convolution is over `taps` tokens."""

    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """The numbers in the queries, keys and values of a token."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def qkv(self) -> int:
        return self.channels

    @property
    def width(self) -> int:
        """The numbers that out_proj takes."""
        return self.value_heads * self.value_dim

    @property
    def cached(self) -> States:
        heads = self.key_heads, self.value_heads // self.key_heads
        return States((*heads, self.key_dim, self.value_dim), (self.taps - 1, self.channels))

    @property
    def sites(self) -> tuple[Site, ...]:
        D, K, V = self.hidden, self.key_heads * self.key_dim, self.width
        return (
            Site("in_proj_q", D, K, "attn", ("embed", "heads"), merged="in_proj_qkvz"),
            Site("in_proj_k", D, K, "attn", ("embed", "heads"), merged="in_proj_qkvz"),
            Site("in_proj_v", D, V, "attn", ("embed", "heads"), merged="in_proj_qkvz"),
            Site("in_proj_z", D, V, "attn", ("embed", "heads"), merged="in_proj_qkvz"),
            Site("in_proj_b", D, self.value_heads, None, ("embed", "heads")),
            Site("in_proj_a", D, self.value_heads, None, ("embed", "heads")),
            Site("out_proj", V, D, "attn", ("summed_heads", "hidden")),
        )

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (Norm("delta_norm", self.value_dim, "head_dim", plain=True),)

    @property
    def vectors(self) -> tuple[Vector, ...]:
        return (
            Vector("conv1d", (self.channels, 1, self.taps), ("hidden", "hidden", "hidden"), (-0.5, 0.5)),
            Vector("A_log", (self.value_heads,), ("heads",), (-3.0, 1.4)),
            Vector("dt_bias", (self.value_heads,), ("heads",), (0.5, 1.5)),
        )


@dataclass(frozen=True)
class Mamba2:
    """A Mamba-2 (`mamba2`) with `heads` heads of `head_dim` numbers, and a state of `state_dim` numbers for
    each of these. `groups` divides `heads`; the heads of a group share B and C. The convolution is over
    `taps` tokens. Time steps are at least `least_step`."""

    hidden: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    taps: int
    least_step: float
    conv_biased: bool = True

    @property
    def width(self) -> int:
        """The numbers that out_proj takes."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """The numbers of a token that pass the convolution: the heads' inputs, B and C."""
        return self.width + 2 * self.groups * self.state_dim

    @property
    def qkv(self) -> int:
        return self.channels

    @property
    def cached(self) -> States:
        heads = self.groups, self.heads // self.groups
        return States((*heads, self.head_dim, self.state_dim), (self.taps - 1, self.channels))

    @property
    def sites(self) -> tuple[Site, ...]:
        D, W, S = self.hidden, self.width, self.groups * self.state_dim
        return (
            Site("gate_proj", D, W, "attn", ("embed", "heads"), merged="in_proj"),
            Site("x_proj", D, W, "attn", ("embed", "heads"), merged="in_proj"),
            Site("b_proj", D, S, None, ("embed", "heads")),
            Site("c_proj", D, S, None, ("embed", "heads")),
            Site("dt_proj", D, self.heads, None, ("embed", "heads")),
            Site("out_proj", W, D, "attn", ("heads", "embed")),
        )

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (Norm("mamba_norm", self.width, "heads", groups=self.groups),)

    @property
    def vectors(self) -> tuple[Vector, ...]:
        bias = Vector("conv1d_bias", (self.channels,), ("hidden",), (-0.5, 0.5))
        return (
            Vector("conv1d", (self.channels, 1, self.taps), ("hidden", "hidden", "hidden"), (-0.5, 0.5)),
            *((bias,) if self.conv_biased else ()),
            Vector("A_log", (self.heads,), ("heads",), (0.0, 2.8)),
            Vector("dt_bias", (self.heads,), ("heads",), (-4.6, -2.2)),
            Vector("D", (self.heads,), ("heads",), (0.5, 1.5)),
        )


Recurrent = DeltaNet | Mamba2
"""The mixers that keep a state of every sequence, whatever its length."""


@dataclass(frozen=True)
class Latent:
    """Latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values of all heads are made of `kv_rank` numbers per token, and of `rope_dim` numbers that are
    rotated and belong to the keys of all heads. Queries pass through `query_rank` numbers, unless it is None.
    Of each head's key, `plain_dim` numbers are not rotated; its value has `value_dim`. `score_factor` is
    multiplied into the scores (YaRN's `mscale_all_dim`, squared).

    In training, and where the sampler begins a prompt, keys and values are expanded for every head. The
    sampler stores the latents; to attend to stored ones, it multiplies the queries and the outputs with the
    matrix that would expand them: one key for all heads, whose first numbers are the value.
    """

    hidden: int
    heads: int
    query_rank: int | None
    kv_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    score_factor: float = 1.0
    biased: tuple[str, ...] = ()

    window: ClassVar[int | None] = None
    sinks: ClassVar[bool] = False
    kv_heads: ClassVar[int] = 1

    @property
    def key_dim(self) -> int:
        return self.plain_dim + self.rope_dim

    @property
    def cached(self) -> KeysValues:
        return KeysValues(1, self.head_dim, self.kv_rank, value_in_key=True)

    @property
    def head_dim(self) -> int:
        """The size of the key that the sampler stores for all heads."""
        return self.kv_rank + self.rope_dim

    @property
    def scale(self) -> float:
        """The factor of scores."""
        return self.key_dim**-0.5 * self.score_factor

    @property
    def width(self) -> int:
        """The numbers in the outputs of all heads of a token."""
        return self.heads * max(self.key_dim, self.value_dim)

    @property
    def qkv(self) -> int:
        """The numbers in the queries, keys and values of a token, and in what they are made of."""
        return 3 * self.width + (self.query_rank or 0) + self.head_dim

    @property
    def sites(self) -> tuple[Site, ...]:
        D, Q, C, biased = self.hidden, self.heads * self.key_dim, self.kv_rank, self.biased
        expanded = self.heads * (self.plain_dim + self.value_dim)
        if self.query_rank is None:
            queries: tuple[Site, ...] = (Site("q_proj", D, Q, "attn", ("embed", "heads")),)
        else:
            queries = (
                Site("q_a_proj", D, self.query_rank, "attn", ("embed", "hidden"), "q_a_proj" in biased),
                Site("q_b_proj", self.query_rank, Q, None, ("embed", "heads")),
            )
        latent = "kv_a_proj_with_mqa"
        return (
            *queries,
            Site(latent, D, self.head_dim, "attn", ("embed", "hidden"), latent in biased),
            Site("kv_b_proj", C, expanded, None, ("embed", "heads")),
            Site(
                "o_proj",
                self.heads * self.value_dim,
                D,
                "attn",
                ("summed_heads", "hidden"),
                "o_proj" in biased,
            ),
        )

    @property
    def vectors(self) -> tuple[Vector, ...]:
        return ()

    @property
    def norms(self) -> tuple[Norm, ...]:
        of_queries = () if self.query_rank is None else (Norm("q_a_layernorm", self.query_rank, eps=1e-6),)
        return *of_queries, Norm("kv_a_layernorm", self.kv_rank, eps=1e-6)


@dataclass(frozen=True)
class GatedMlp:
    """down(act(gate x) * up x), with `width` hidden units. `biased` names matrices with biases.

    The activation is silu, or gelu in its approximation by tanh.

    With `fused`, gate and up are one matrix, side by side, and have one adapter together."""

    hidden: int
    width: int
    biased: tuple[str, ...] = ()
    fused: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"

    @property
    def active_width(self) -> int:
        return self.width

    @property
    def sites(self) -> tuple[Site, ...]:
        D, F = self.hidden, self.width
        if self.fused:
            return (
                Site("gate_up_proj", D, 2 * F, "mlp", ("embed", "ff")),
                Site("down_proj", F, D, "mlp", ("summed_ff", "hidden")),
            )
        return (
            Site("gate_proj", D, F, "mlp", ("embed", "ff"), "gate_proj" in self.biased, merged="gate_up"),
            Site("up_proj", D, F, "mlp", ("embed", "ff"), "up_proj" in self.biased, merged="gate_up"),
            Site("down_proj", F, D, "mlp", ("summed_ff", "hidden"), "down_proj" in self.biased),
        )


@dataclass(frozen=True)
class PlainMlp:
    """down(relu(up x)^2), with `width` hidden units and no gate."""

    hidden: int
    width: int

    @property
    def active_width(self) -> int:
        return self.width

    @property
    def sites(self) -> tuple[Site, ...]:
        return (
            Site("up_proj", self.hidden, self.width, "mlp", ("embed", "ff")),
            Site("down_proj", self.width, self.hidden, "mlp", ("summed_ff", "hidden")),
        )


@dataclass(frozen=True)
class Clamp:
    """The activation of gpt-oss (arXiv:2508.10925): (u + 1) g sigmoid(slope g), with g = min(gate, limit) and
    u the other projection, cut to +-limit."""

    slope: float
    limit: float


@dataclass(frozen=True)
class SigmoidRouter:
    """DeepSeek-V3's router (arXiv:2412.19437, section 2.1.2): an expert's probability is the sigmoid of its
    logit.

    Experts are chosen by probability plus a correction that is learned beside the gradient and never trained
    here: first the best `groups_chosen` of `groups` equal groups, by the sum of their two highest, then the
    best experts of these. The weights of the chosen ones are their probabilities times `scaling`."""

    groups: int
    groups_chosen: int
    scaling: float


@dataclass(frozen=True)
class Experts:
    """A mixture of `count` gated MLPs, each with `width` hidden units, of which every token gets `chosen`.

    The router is a softmax over all experts, or `sigmoid`. If `normalised`, the weights of those chosen sum
    to 1, as if the softmax were over them. The matrices have biases if `biased`. `clamp` is the activation of
    the gate, if it is not silu. Every token also passes a gated MLP of `shared` hidden units, if there are
    any; with `shared_gated`, its output is multiplied with the sigmoid of a gate per token.

    With `plain`, all these MLPs are as `PlainMlp`, without a gate. With `latent`, the experts work on so many
    numbers: one matrix makes them of the hidden ones, and another makes hidden ones of the experts' sum."""

    hidden: int
    width: int
    count: int
    chosen: int
    normalised: bool
    biased: bool = False
    clamp: Clamp | None = None
    sigmoid: SigmoidRouter | None = None
    shared: int = 0
    shared_gated: bool = False
    plain: bool = False
    latent: int | None = None

    @property
    def into(self) -> int:
        """The numbers that the experts work on."""
        return self.latent or self.hidden

    @property
    def sites(self) -> tuple[Site, ...]:
        D, F, E, S, bias = self.hidden, self.width, self.count, self.shared, self.biased
        shared_up = Site("shared_up", D, S, "mlp", ("embed", "ff"))
        up = Site("expert_up", self.into, F, "mlp", ("embed", "ff"), bias, E, "a")
        shared_gate_up: tuple[Site, ...] = (shared_up,)
        gate_up: tuple[Site, ...] = (up._replace(numbered="w1"),)
        if not self.plain:
            shared_up, up = shared_up._replace(merged="shared_gate_up"), up._replace(merged="expert_gate_up")
            shared_gate_up = shared_up._replace(name="shared_gate"), shared_up
            gate_up = up._replace(name="expert_gate", numbered="w1"), up._replace(numbered="w3")
        shared = (*shared_gate_up, Site("shared_down", S, D, "mlp", ("summed_ff", "hidden")))
        latent: tuple[Site, ...] = ()
        if self.latent is not None:
            latent = (
                Site("fc1_latent_proj", D, self.latent, "mlp", ("embed", "hidden")),
                Site("fc2_latent_proj", self.latent, D, "mlp", ("hidden", "embed")),
            )
        router = Site("router", D, E, None, ("embed", "experts"), bias)
        if self.sigmoid is not None:
            router = router._replace(bias=True, bias_dtype="float32")  # the correction
        gate = Site("shared_expert_gate", D, 1, None, ("embed", "hidden"))
        return (
            router,
            *((gate,) if self.shared_gated else ()),
            *(shared if S else ()),
            *latent,
            *gate_up,
            Site("expert_down", F, self.into, "mlp", ("summed_ff", "hidden"), bias, E, "b", numbered="w2"),
        )

    @property
    def active_width(self) -> int:
        """The hidden units that a token passes."""
        return self.chosen * self.width + self.shared


@dataclass(frozen=True)
class Layer:
    """A mixer and an MLP, each after an RMSNorm and added to the residual stream; or only one of the two.

    With `sandwich`, each is also followed by a norm."""

    mixer: Attention | Latent | Recurrent | None
    mlp: GatedMlp | PlainMlp | Experts | None
    sandwich: bool = False

    @property
    def cached(self) -> CacheKind | None:
        return None if self.mixer is None else self.mixer.cached

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for part in (self.mixer, self.mlp) if part is not None for site in part.sites)

    @property
    def norms(self) -> tuple[Norm, ...]:
        names = ["input_layernorm"]
        if self.mixer is not None and self.mlp is not None:
            names.append("post_attention_layernorm")
        if self.sandwich:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        (hidden,) = {part.hidden for part in (self.mixer, self.mlp) if part is not None}
        of_mixer = () if self.mixer is None else self.mixer.norms
        return *(Norm(name, hidden) for name in names), *of_mixer

    @property
    def vectors(self) -> tuple[Vector, ...]:
        return () if self.mixer is None else self.mixer.vectors


@dataclass(frozen=True)
class Group:
    """A pattern of layers, `repeats` times."""

    pattern: tuple[Layer, ...]
    repeats: int


@dataclass(frozen=True)
class Stack:
    """Equal layers whose parameters lie side by side on a leading axis.

    `key` is the stack's name below "layers" in our trees. It is None for a decoder with only one stack, whose
    parameters are directly below "layers". `layers` are the numbers of its layers in the decoder.
    """

    key: str | None
    layer: Layer
    layers: range

    def of(self, layers: dict[str, Any]) -> dict[str, Any]:
        """Return the stack's part of the tree below "layers"; nothing if an adapter has none."""
        return layers if self.key is None else layers.get(self.key, {})

    def path(self, name: str) -> str:
        """Return the dotted path of a parameter of the stack in our trees."""
        return f"layers.{name}" if self.key is None else f"layers.{self.key}.{name}"


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines a decoder's parameters and arithmetic.

    Hashable, for use as a static jit argument."""

    family: str
    vocab_size: int
    hidden_size: int
    groups: tuple[Group, ...]
    rms_norm_eps: float
    max_sequence_length: int
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    wide_norms: bool = False
    """Whether the norms multiply with their weight in float32, before they round to the dtype."""
    centred_norms: bool = False
    """Whether the norms, which are then wide, multiply with 1 + their weight."""
    prefix: str = "model."
    """What the names of tensors in the files begin with, except the head's."""
    stacked_experts: bool = False
    """Whether the files hold a layer's experts in one tensor, where the family knows another layout."""
    stacked_in_out: bool = False
    """Whether these tensors are [experts, in, out] and not [experts, out, in]."""
    embedding_scale: float = 1.0
    """What embeddings are multiplied with, rounded to the dtype."""

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Return all layers in order."""
        return tuple(layer for group in self.groups for layer in group.pattern * group.repeats)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def stacks(self) -> tuple[tuple[Stack, ...], ...]:
        """The stacks of each group, one per layer of its pattern."""
        stacks, first = [], 0
        for group in self.groups:
            step, end = len(group.pattern), first + len(group.pattern) * group.repeats
            stacks.append([(layer, range(first + i, end, step)) for i, layer in enumerate(group.pattern)])
            first = end
        alone = sum(map(len, stacks)) == 1
        return tuple(
            tuple(Stack(None if alone else f"stack{g}_{i}", *each) for i, each in enumerate(group))
            for g, group in enumerate(stacks)
        )

    @cached_property
    def all_stacks(self) -> tuple[Stack, ...]:
        return tuple(stack for group in self.stacks for stack in group)

    @cached_property
    def mixtures(self) -> dict[int, Experts]:
        """The mixtures of experts, by the numbers of their layers, in order."""
        return {
            number: layer.mlp for number, layer in enumerate(self.layers) if isinstance(layer.mlp, Experts)
        }

    @property
    def routing(self) -> tuple[int, int, int] | None:
        """The numbers of layers with experts, of experts that a token gets in each, and of experts in each.

        None if no layer has any."""
        first = next(iter(self.mixtures.values()), None)
        return None if first is None else (len(self.mixtures), first.chosen, first.count)

    @cached_property
    def places(self) -> tuple[tuple[Stack, int], ...]:
        """Each layer's stack, and its index there."""
        places = {
            layer: (stack, index) for stack in self.all_stacks for index, layer in enumerate(stack.layers)
        }
        return tuple(places[layer] for layer in range(self.num_layers))

    @cached_property
    def cache_kinds(self) -> tuple[CacheKind, ...]:
        """The different things that the sampler caches for layers."""
        return tuple(dict.fromkeys(layer.cached for layer in self.layers if layer.cached is not None))

    @cached_property
    def cache_numbers(self) -> tuple[int, ...]:
        """Each layer's number among those for which the same is cached."""
        seen: Counter[CacheKind | None] = Counter()
        numbers = []
        for layer in self.layers:
            numbers.append(seen[layer.cached])
            seen[layer.cached] += 1
        return tuple(numbers)

    @property
    def has_states(self) -> bool:
        """True if layers keep a state of every sequence, beside or instead of keys and values."""
        return any(isinstance(kind, States) for kind in self.cache_kinds)

    @cached_property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings."""
        return tuple(dict.fromkeys(mixer.rope for mixer in self.attentions))

    @cached_property
    def mixers(self) -> tuple[Attention | Latent | Recurrent, ...]:
        """The mixers of all layers that have one, in order."""
        return tuple(layer.mixer for layer in self.layers if layer.mixer is not None)

    @cached_property
    def attentions(self) -> tuple[Attention | Latent, ...]:
        """The mixers of all layers with attention, in order."""
        return tuple(mixer for mixer in self.mixers if not isinstance(mixer, Recurrent))


def fold(layers: Sequence[Layer]) -> tuple[Group, ...]:
    """Group a list of layers: at each place, the pattern whose repeats cover the most layers; among equals,
    the shortest."""
    groups, at = [], 0
    while at < len(layers):
        best = Group((layers[at],), 1)
        for length in range(1, (len(layers) - at) // 2 + 1):
            pattern, repeats = tuple(layers[at : at + length]), 1
            while tuple(layers[at + repeats * length : at + (repeats + 1) * length]) == pattern:
                repeats += 1
            if repeats > 1 and repeats * length > len(best.pattern) * best.repeats:
                best = Group(pattern, repeats)
        groups.append(best)
        at += len(best.pattern) * best.repeats
    return tuple(groups)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file; None if the file does not exist.

    Raises UnsupportedModelError for a damaged file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path} does not hold a JSON object")
    return content
