"""Counts a model's parameters and activations, for plans of memory and arithmetic.

Imports no array library: a plan needs config.json alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .config import Experts, Layer, ModelConfig, Site, States
from .families import parameter_count

SPARE_ROWS = 1.25
"""Where experts are divided among devices, a device computes this many times the rows of its equal share at
first (`experts`)."""


@dataclass(frozen=True)
class ExpertCounts:
    """The mixtures among a model's layers: how many there are, the experts of each, and those of a token.

    `stored` are the elements of all experts' matrices, and `adapter_per_rank` those of each expert's own
    factors in a LoRA of rank 1. Both are part of the model's."""

    layers: int
    count: int
    chosen: int
    stored: int
    adapter_per_rank: int


@dataclass(frozen=True)
class Counts:
    """Numbers of elements (not bytes) of a decoder's weights, and of the activations of one token.

    `stored` are the elements of all layers' matrices, `matrices` those that a token is multiplied with (of
    experts, those that it gets); each token takes two FLOPs for each of these in a forward pass.
    `last_matrices` are those of the last matrix of every layer, whose product a recomputation does not need.
    `adapter_per_rank` are the elements that a LoRA of rank 1 on all matrices and the head has,
    `active_adapter_per_rank` those that a token is multiplied with. `experts` is None without any.
    """

    parameters: int
    stored: int
    matrices: int
    last_matrices: int
    head: int  # vocabulary x hidden
    adapter_per_rank: int
    active_adapter_per_rank: int
    num_layers: int
    vocab_size: int
    hidden: int
    feed_forward: int
    qkv: int  # queries, keys and values of one token in one layer
    attention_width: int  # heads x head size
    kv_per_position: int  # keys and values of one position in all layers
    kv_heads: int
    windows: tuple[int | None, ...]  # of each layer of attention: the most keys that a query sees; None: all
    state_per_sequence: int = 0  # float32 numbers of a sequence's states in all layers
    experts: ExpertCounts | None = None


def counts(config: ModelConfig) -> Counts:
    """Return the counts of a model. Every plan asks for them here."""
    mixers, mlps = config.mixers, [layer.mlp for layer in config.layers if layer.mlp is not None]
    return Counts(
        parameters=parameter_count(config),
        stored=sum(prod(site.shape) for layer in config.layers for site in layer.sites),
        matrices=sum(_active(layer, site) for layer in config.layers for site in layer.sites),
        last_matrices=sum(_active(layer, layer.sites[-1]) for layer in config.layers),
        head=config.vocab_size * config.hidden_size,
        adapter_per_rank=sum(adapter_counts(config, 1).values()),
        active_adapter_per_rank=config.hidden_size
        + config.vocab_size
        + sum(_used(layer, site) * (site.into + site.out) for layer in config.layers for site in layer.sites),
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        hidden=config.hidden_size,
        feed_forward=max((mlp.active_width for mlp in mlps), default=0),
        qkv=max(mixer.qkv for mixer in mixers),
        attention_width=max(mixer.width for mixer in mixers),
        kv_per_position=sum(mixer.cached.per_token for mixer in mixers),
        kv_heads=max(mixer.kv_heads for mixer in config.attentions),
        windows=tuple(mixer.window for mixer in config.attentions),
        state_per_sequence=sum(
            kind.per_sequence for kind in (mixer.cached for mixer in mixers) if isinstance(kind, States)
        ),
        experts=_expert_counts(config),
    )


def _expert_counts(config: ModelConfig) -> ExpertCounts | None:
    if config.routing is None:
        return None
    layers, chosen, count = config.routing
    sites = [site for layer in config.layers for site in layer.sites if site.experts is not None]
    own = sum(prod(site.factors(1)["b" if site.shared == "a" else "a"]) for site in sites)
    return ExpertCounts(layers, count, chosen, sum(prod(site.shape) for site in sites), own)


def adapter_counts(config: ModelConfig, rank: int) -> dict[str, int]:
    """Return the numbers of trained parameters of a LoRA, by part: attn, mlp and unembed."""
    found = {"attn": 0, "mlp": 0, "unembed": rank * (config.hidden_size + config.vocab_size)}
    for layer in config.layers:
        for site in layer.sites:
            if site.part is not None:
                found[site.part] += sum(map(prod, site.factors(rank).values()))
    return found


def _active(layer: Layer, site: Site) -> int:
    """Return the elements of a matrix that a token is multiplied with: of experts, those that it gets."""
    return _used(layer, site) * site.into * site.out


def _used(layer: Layer, site: Site) -> int:
    """Return how many matrices of a site a token is multiplied with."""
    return layer.mlp.chosen if isinstance(layer.mlp, Experts) and site.experts is not None else 1
