"""Adapters for tests."""

from collections.abc import Iterator

import jax
import numpy as np
from tinsmith.model import lora
from tinsmith.model.config import ModelConfig, Site


def random_adapter(config: ModelConfig, seed: int = 0, rank: int = 8, size: float = 0.1, **which):
    """Make an adapter whose B is not zero; the padding of its rank is."""
    adapter = lora.init_lora(config, seed, rank, **which)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key == "b":
            leaf[..., :rank, :] = size * rng.standard_normal(leaf[..., :rank, :].shape)
        return leaf

    return jax.tree_util.tree_map_with_path(fill, adapter)


def by_layer(adapter, config: ModelConfig) -> Iterator[tuple[int, Site, np.ndarray, np.ndarray]]:
    """Yield (number of the layer, site, A, B) of each matrix of the layers that the adapter has."""
    for stack, site, pair in lora.pairs(adapter, config):
        for at, layer in enumerate(stack.layers):
            yield layer, site, np.asarray(pair["a"][at]), np.asarray(pair["b"][at])
