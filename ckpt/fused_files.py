"""Names and layouts of the adapters of matrices that lie in one tensor: `in_proj_qkv` of delta nets, and
`in_proj` of Mamba-2.

Each has an adapter of its own, with a name of its own (`in_proj_q`), in the files of the hosted service, and
here. PEFT's readers know the whole matrix only. For them, A holds the factors of all parts, one below the
other, and B is block-diagonal, so its rank is theirs together; rows of matrices that are never trained are
zero. Both forms are read, and adapters that PEFT trained of the whole matrix too: all parts then have the
same A.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ..model.config import ModelConfig, Site
from ..model.families import adapter_module, module_name

Factors = dict[str, np.ndarray]


class Fused(NamedTuple):
    """A module of one layer in which several sites lie one after the other; both names begin alike.

    `sites` are those that an adapter may have, `rows` the first of their rows and the end of these among the
    module's `out` rows, and `parts` the names of their own adapters."""

    module: str
    sites: tuple[Site, ...]
    rows: tuple[tuple[int, int], ...]
    parts: tuple[str, ...]
    out: int

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]

    def written(self, pairs: list[Factors]) -> tuple[np.ndarray, np.ndarray]:
        """Return A [in, n r] and B [n r, out] of the whole from the sites' factors."""
        rank = pairs[0]["a"].shape[-1]
        b = np.zeros((len(pairs) * rank, self.out), np.float32)
        for number, (rows, pair) in enumerate(zip(self.rows, pairs, strict=True)):
            b[number * rank : (number + 1) * rank, slice(*rows)] = pair["b"]
        return np.concatenate([pair["a"] for pair in pairs], axis=1), b

    def read(self, a: np.ndarray, b: np.ndarray, in_blocks: bool) -> Iterator[Factors]:
        """Yield the factors of each site from those of the whole, [out, in] as in files.

        `in_blocks` says that every site has its share of the rank. Raises ValueError if it does not, or if
        rows are changed that an adapter cannot have here."""
        rank = len(a) // len(self.sites)
        if b.shape[0] != self.out:
            yield from ({"a": a, "b": b} for _ in self.sites)  # refused for its shape
            return
        if np.delete(b, np.r_[tuple(slice(*rows) for rows in self.rows)], axis=0).any():
            of_sites = ", ".join(site.name for site in self.sites)
            raise ValueError(
                f"{self.module}.lora_B changes rows that are never trained here; only those of {of_sites} are"
            )
        for number, at in enumerate(self.rows):
            rows, own = b[slice(*at)], slice(number * rank, (number + 1) * rank)
            if in_blocks and np.delete(rows, np.r_[own], axis=1).any():
                raise ValueError(f"{self.module}.lora_B is not block-diagonal, as its rank pattern says")
            yield {"a": a[own], "b": rows[:, own]} if in_blocks else {"a": a, "b": rows}


def fused_modules(config: ModelConfig, prefix: str, layer: int) -> Iterator[Fused]:
    """Yield the modules of a layer in which several sites lie; names begin with `prefix`."""
    by_module: dict[str, list[Site]] = {}
    for site in config.layers[layer].sites:
        if site.experts is None:
            module = prefix + module_name(config, f"layers.{site.name}.weight", layer)
            by_module.setdefault(module, []).append(site)
    for module, sites in by_module.items():
        if len(sites) == 1:
            continue
        stops = accumulate(site.out for site in sites)
        places = [(site, (stop - site.out, stop)) for site, stop in zip(sites, stops, strict=True)]
        if trained := [(site, rows) for site, rows in places if site.part]:
            parts = tuple(prefix + adapter_module(config, site, layer) for site, _ in trained)
            of_sites, rows = zip(*trained, strict=True)
            yield Fused(module, of_sites, rows, parts, places[-1][1][1])


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
