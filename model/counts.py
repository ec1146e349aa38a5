"""Counts a model's parameters and activations, for plans of memory and arithmetic.

Imports no array library: a plan needs config.json alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

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
    L, D, H = config.num_layers, config.hidden_size, config.head_dim
    linears = config.linears
    windowed = config.windowed_layers or (config.sliding_window is not None,) * L
    return Counts(
        parameters=parameter_count(config),
        matrices=L * sum(map(prod, linears.values())),
        last_matrices=L * prod(linears["down_proj"]),
        head=config.vocab_size * D,
        adapter_per_rank=L * sum(map(sum, linears.values())) + config.vocab_size + D,
        num_layers=L,
        vocab_size=config.vocab_size,
        hidden=D,
        feed_forward=config.intermediate_size,
        qkv=(config.num_heads + 2 * config.num_kv_heads) * H,
        attention_width=config.num_heads * H,
        kv_per_position=2 * L * config.num_kv_heads * H,
        kv_heads=config.num_kv_heads,
        windows=tuple(config.sliding_window if each else None for each in windowed),
    )
