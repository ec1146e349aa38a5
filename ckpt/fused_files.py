"""How the adapters of matrices that lie in one tensor are named and stored: `in_proj_qkv` of delta nets.

Each has an adapter of its own, with a name of its own (`in_proj_q`), in the files of the hosted service, and
here. PEFT's readers know the whole matrix only. For them, A holds the factors of all parts, one below the
other, and B is block-diagonal, so its rank is theirs together. Both forms are read, and adapters that PEFT
trained of the whole matrix too: all parts then have the same A.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..model.config import ModelConfig, Site
from ..model.families import adapter_module, module_name

Factors = dict[str, np.ndarray]


class Fused(NamedTuple):
    """A module of one layer in which several sites lie one after the other; both names begin alike."""

    module: str
    sites: tuple[Site, ...]
    parts: tuple[str, ...]
    """The names of the sites' own adapters."""

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]

    def written(self, pairs: list[Factors]) -> tuple[np.ndarray, np.ndarray]:
        """Return A [in, n r] and B [n r, out] of the whole from the sites' factors."""
        rank, first = pairs[0]["a"].shape[-1], 0
        b = np.zeros((len(pairs) * rank, sum(site.out for site in self.sites)), np.float32)
        for number, (site, pair) in enumerate(zip(self.sites, pairs, strict=True)):
            b[number * rank : (number + 1) * rank, first : first + site.out] = pair["b"]
            first += site.out
        return np.concatenate([pair["a"] for pair in pairs], axis=1), b

    def read(self, a: np.ndarray, b: np.ndarray, in_blocks: bool) -> Iterator[Factors]:
        """Yield the factors of each site from those of the whole, [out, in] as in files.

        `in_blocks` says that every site has its share of the rank. Raises ValueError if it does not."""
        rank, first = len(a) // len(self.sites), 0
        if b.shape[0] != sum(site.out for site in self.sites):
            yield from ({"a": a, "b": b} for _ in self.sites)  # refused for its shape
            return
        for number, site in enumerate(self.sites):
            rows, own = b[first : first + site.out], slice(number * rank, (number + 1) * rank)
            first += site.out
            if in_blocks and np.delete(rows, np.r_[own], axis=1).any():
                raise ValueError(f"{self.module}.lora_B is not block-diagonal, as its rank pattern says")
            yield {"a": a[own], "b": rows[:, own]} if in_blocks else {"a": a, "b": rows}


def fused_modules(config: ModelConfig, prefix: str, layer: int) -> Iterator[Fused]:
    """Yield the modules of a layer in which several sites lie; names begin with `prefix`."""
    by_module: dict[str, list[Site]] = {}
    for site in config.layers[layer].sites:
        if site.part and site.experts is None:
            module = prefix + module_name(config, f"layers.{site.name}.weight", layer)
            by_module.setdefault(module, []).append(site)
    for module, sites in by_module.items():
        if len(sites) > 1:
            parts = tuple(prefix + adapter_module(config, site, layer) for site in sites)
            yield Fused(module, tuple(sites), parts)


def separated(
    tensors: dict[str, np.ndarray], config: ModelConfig, prefix: str, in_blocks: frozenset[str]
) -> dict[str, Fused]:
    """Replace the tensors of whole modules by those of their sites.

    `in_blocks` are the modules in which every site has its share of the rank. Returns the module from which
    each site's tensors come."""
    found: dict[str, Fused] = {}
    for layer in range(config.num_layers):
        for fused in fused_modules(config, prefix, layer):
            names = [f"{fused.module}.lora_{side}.weight" for side in "AB"]
            if not all(name in tensors and tensors[name].ndim == 2 for name in names):
                continue
            a, b = (tensors.pop(name) for name in names)
            of_sites = fused.read(a, b, fused.module in in_blocks)
            for part, factors in zip(fused.parts, of_sites, strict=True):
                tensors |= {f"{part}.lora_{side.upper()}.weight": factors[side] for side in "ab"}
                found[part] = fused
    return found
