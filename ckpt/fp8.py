"""Weights in float8 (e4m3) with float32 scales, in the layout that SGLang and vLLM call `fp8`.

    W[i, j] ~ weight[i, j] x scale[i // rows, j // columns]

The scale of a block is its largest magnitude divided by 448, the largest number of the format, so that
nothing overflows. The error of a weight is at most 1/28 of the largest weight in its block (half of the
spacing 32 at 448), or 1/16 of the weight itself if that is less, except for the smallest numbers of the
format. The scales of a matrix are a tensor beside it: `weight_scale_inv` [ceil(out / rows), ceil(in /
columns)] for blocks, or `weight_scale`, one number, for a whole matrix. DeepSeek-V3 (arXiv:2412.19437,
section 3.3) uses blocks of 128 x 128, which are the servers' default.

The layers' matrices that an adapter may have are quantized, if each is a tensor of its own in the files.
Embeddings, the unembedding, routers, norms and biases are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from ..model.config import ModelConfig, Site
from ..model.families import in_files, module_name
from .hf_folder import Tensors

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = float(ml_dtypes.finfo(E4M3).max)


@dataclass(frozen=True)
class Fp8:
    """A float8 format. `block` is the rows and columns that share a scale; None means a whole matrix. `kept`
    are modules that are not quantized, by their Hugging Face name or the last part of it."""

    block: tuple[int, int] | None = (128, 128)
    kept: tuple[str, ...] = ()

    def config(self, config: ModelConfig) -> dict[str, Any]:
        """Return the `quantization_config` for the config.json of a model."""
        quantized = self.quantized_modules(config)
        kept = [
            module
            for layer in range(config.num_layers)
            for site in config.layers[layer].sites
            if not _is_router(site)
            for module in _modules(config, site, layer)
            if module not in quantized
        ]
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": None if self.block is None else list(self.block),
            "modules_to_not_convert": [in_files(config, "lm_head"), *kept],
        }

    def quantized_modules(self, config: ModelConfig) -> frozenset[str]:
        """Return the Hugging Face names of the modules whose weights are quantized."""
        found: set[str] = set()
        for layer, description in enumerate(config.layers):
            for site in filter(lambda site: site.part, description.sites):
                merged = [each for each in description.sites if each.merged and each.merged == site.merged]
                together = zip(*(_modules(config, each, layer) for each in merged or [site]), strict=True)
                for module, fused in zip(_modules(config, site, layer), together, strict=True):
                    if not any(map(self._is_kept, fused)):
                        found.add(module)
        return frozenset(found)

    def _is_kept(self, module: str) -> bool:
        return any(module == kept or module.endswith(f".{kept}") for kept in self.kept)


def _modules(config: ModelConfig, site: Site, layer: int) -> list[str]:
    """List the modules with the matrices of a site in one layer. Matrices of experts that share a tensor have
    none."""
    module = in_files(config, module_name(config, f"layers.{site.name}.weight", layer))
    if site.experts is None:
        return [module]
    return [module.format(expert=expert) for expert in range(site.experts)] if "{expert}" in module else []


def _is_router(site: Site) -> bool:
    """Servers never quantize routers; SGLang would take the name of one for the beginning of others."""
    return site.axes[1] == "experts"


def quantized(tensors: Tensors, spec: Fp8, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Quantize the matrices of the layers, each followed by its scales; other tensors pass unchanged."""
    scale_name = "weight_scale" if spec.block is None else "weight_scale_inv"
    modules = spec.quantized_modules(config)
    for name, array in tensors:
        if not name.endswith(".weight") or name.removesuffix(".weight") not in modules:
            yield name, array
            continue
        weight, scale = quantize(array, spec.block)
        yield name, weight
        yield name.removesuffix("weight") + scale_name, scale


def quantize(
    weight_OI: Float[np.ndarray, "O I"], block: tuple[int, int] | None
) -> tuple[Float[np.ndarray, "O I"], Float[np.ndarray, ...]]:
    """Return a matrix in float8, and its float32 scales [blocks of O, blocks of I], or [] without blocks."""
    O, I = weight_OI.shape  # noqa: E741  the letters of the shapes
    rows, columns = block or (O, I)
    blocks = (-(-O // rows), -(-I // columns))
    padded = np.zeros((blocks[0] * rows, blocks[1] * columns), np.float32)
    padded[:O, :I] = weight_OI
    by_block = padded.reshape(blocks[0], rows, blocks[1], columns)
    largest = np.abs(by_block).max(axis=(1, 3))
    scale = np.where(largest > 0, largest / LARGEST, 1.0).astype(np.float32)
    scaled = np.clip(by_block / scale[:, None, :, None], -LARGEST, LARGEST).astype(E4M3)
    weight = np.ascontiguousarray(scaled.reshape(padded.shape)[:O, :I])
    return weight, scale.reshape(()) if block is None else scale
