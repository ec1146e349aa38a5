"""Adapters for tests."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tinsmith.model import families, lora
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


def by_layer(adapter, config: ModelConfig, form=np.asarray) -> Iterator[tuple[int, Site, Any, Any]]:
    """Yield (number of the layer, site, A, B) of each matrix of the layers that the adapter has."""
    for stack, site, pair in lora.pairs(adapter, config):
        for at, layer in enumerate(stack.layers):
            yield layer, site, form(pair["a"][at]), form(pair["b"][at])


def parameters_with(model, adapter, config: ModelConfig, scale: float) -> dict:
    """Return a transformers model's parameters with an adapter's products added: W + scale x (A B)^T.

    `adapter` holds torch tensors, through which gradients pass, or arrays. Experts' gate and up are one
    parameter in transformers. A head with an adapter is a parameter of its own, also beside a tied embedding.
    """
    import torch

    def tensor(x):
        return x if isinstance(x, torch.Tensor) else torch.tensor(np.array(x))

    parameters = dict(model.named_parameters())
    interleaved = config.family == "gpt_oss"  # and [in, out]
    experts: dict[str, dict[str, torch.Tensor]] = {}
    for layer, site, a, b in by_layer(adapter, config, tensor):
        delta = scale * (a @ b)
        if site.experts is None or not interleaved:
            delta = delta.transpose(-1, -2)
        if site.experts is None:
            stack, _ = config.places[layer]
            placed = next(
                p for p in families.parameters(config) if p.path == stack.path(f"{site.name}.weight")
            )
            name = placed.name.replace(config.prefix, "model.", 1).format(layer=layer)
            if placed.part is not None:
                first, stop, _ = placed.part
                delta = torch.nn.functional.pad(delta, (0, 0, first, placed.whole - stop))
            parameters[name] = parameters[name] + delta
            continue
        at = families.module_name(config, f"layers.{site.name}.weight", layer).rpartition(".experts.")[0]
        if site.name == "expert_down" or config.layers[layer].mlp.plain:
            name = f"{at}.experts.{site.name.removeprefix('expert_')}_proj"
            parameters[name] = parameters[name] + delta
        else:
            experts.setdefault(at, {})[site.name] = delta
    for at, deltas in experts.items():
        name = f"{at}.experts.gate_up_proj"
        pair = [deltas["expert_gate"], deltas["expert_up"]]
        both = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=1)
        parameters[name] = parameters[name] + both
    if "unembed" in adapter:
        head = parameters["lm_head.weight" if "lm_head.weight" in parameters else "model.embed_tokens.weight"]
        a, b = (tensor(adapter["unembed"][side]) for side in "ab")
        parameters["lm_head.weight"] = head + scale * (a @ b).T
    return parameters
