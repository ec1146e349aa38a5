"""Loads base weights from safetensors files straight into (sharded) device arrays.

The files are memory-mapped. For each stacked parameter, JAX asks for the slices that this process's devices
hold. Each slice is built from the mapped file once and handed over, so the host holds one slice at a time and
never a second copy of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from . import decoder
from .config import ModelConfig
from .sharding import make_mesh, shardings_for
from .weight_files import MappedTensors, unread

log = logging.getLogger(__name__)

_NAMED_UNREAD = 5


def find_model(model: str) -> Path:
    """Return the folder of `model`, a local path or a hub id (which is downloaded and cached)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{model} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))


def load_base(
    folder: Path,
    config: ModelConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    loaded: Callable[[int, int], object] = lambda so_far, total: None,
) -> decoder.Base:
    """Load the base weights of `folder` as `dtype`, each leaf sharded over `mesh` by `sharding.RULES`.

    Without a mesh they go to the first device. `loaded` is called after each leaf, with the bytes of the
    leaves so far and of all. Raises WeightsError for files that do not fit `config`.
    """
    mesh = make_mesh() if mesh is None else mesh
    _, abstract = decoder.build(config, dtype)
    shardings = shardings_for(abstract, decoder.logical_axes(config), mesh)
    tensors = MappedTensors(Path(folder))
    parameters = tensors.parameters(config)
    if ignored := unread(Path(folder), config):
        some = ", ".join(ignored[:_NAMED_UNREAD])
        log.warning("%s: %d tensors are not of this model and are ignored: %s", folder, len(ignored), some)

    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    so_far = 0

    def load(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        ours = ".".join(key.key for key in path)
        views = tensors.views(parameters[ours])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if parameters[ours].layers is None:
                return np.ascontiguousarray(views[0][index], dtype=leaf.dtype)
            sizes = (len(range(*cut.indices(size))) for cut, size in zip(index, leaf.shape, strict=True))
            out = np.empty(tuple(sizes), leaf.dtype)
            for row, view in zip(out, views[index[0]], strict=True):
                row[...] = view[index[1:]]
            return out

        nonlocal so_far
        array = jax.make_array_from_callback(leaf.shape, sharding, part)
        array.block_until_ready()
        tensors.forget_pages()
        so_far += array.nbytes
        loaded(so_far, total)
        return array

    return jax.tree_util.tree_map_with_path(load, abstract, shardings)
