"""Counts a model's parameters and activations, for plans of memory and arithmetic.

Imports no array library: a plan needs config.json alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig
from .families import parameter_count


@dataclass(frozen=True)
class Counts:
    """Numbers of elements (not bytes) of a decoder's weights, and of the activations of one token.

    `matrices` are the elements of all layers' matrices; each token takes two FLOPs for each of them in a
    forward pass. `last_matrices` are those of the last matrix of every layer, whose product a recomputation
    does not need. `adapter_per_rank` are the elements that a LoRA of rank 1 on all matrices and the head has.
    """

    parameters: int
    matrices: int
    last_matrices: int
    head: int  # vocabulary x hidden
    adapter_per_rank: int
    num_layers: int
    vocab_size: int
    hidden: int
    feed_forward: int
    qkv: int  # queries, keys and values of one token in one layer
    attention_width: int  # heads x head size
    kv_per_position: int  # keys and values of one position in all layers
    kv_heads: int
    windows: tuple[int | None, ...]  # of each layer: the most keys that a query sees; None: all


def counts(config: ModelConfig) -> Counts:
    """Return the counts of a model. Every plan asks for them here."""
    layers = config.layers
    sites = [site for layer in layers for site in layer.sites]
    mixers = [layer.mixer for layer in layers]
    return Counts(
        parameters=parameter_count(config),
        matrices=sum(site.into * site.out for site in sites),
        last_matrices=sum(site.into * site.out for site in sites if site.name == "down_proj"),
        head=config.vocab_size * config.hidden_size,
        adapter_per_rank=sum(site.into + site.out for site in sites) + config.vocab_size + config.hidden_size,
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        hidden=config.hidden_size,
        feed_forward=max(layer.mlp.width for layer in layers),
        qkv=max(mixer.qkv for mixer in mixers),
        attention_width=max(mixer.heads * mixer.head_dim for mixer in mixers),
        kv_per_position=sum(2 * mixer.kv_heads * mixer.head_dim for mixer in mixers),
        kv_heads=max(mixer.kv_heads for mixer in mixers),
        windows=tuple(mixer.window for mixer in mixers),
    )
